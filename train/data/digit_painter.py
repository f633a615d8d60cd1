"""Painting a picture of Scattered Digits, and all that is known of it: every choice is drawn from one generator."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from .digit_config import DigitsConfig
from .digit_parts import KINDS, PHOTOGRAPHS, Material

_SHRINKS = (1, 2, 4)  # a photograph is shown at full, half or quarter size
_TRIES = 30  # places tried for a digit before it is left out


@dataclass(frozen=True)
class Digit:
    """One digit as it is seen.

    Attributes
    ----------
    label : int
        0 to 9.
    box : tuple of int
        (x0, y0, x1, y1) in pixels, x1 and y1 exclusive: the bounding box of the mask.
    mask : ndarray of bool, shape (height, width)
        Pixels that show this digit's ink, anti-aliased rims included, what later digits hide excluded.
    """

    label: int
    box: tuple[int, int, int, int]
    mask: np.ndarray


@dataclass(frozen=True)
class Scene:
    """A picture and all that is known of it.

    Attributes
    ----------
    image : ndarray of uint8, shape (height, width, 3)
        RGB.
    digits : tuple of Digit
        In the order painted; the masks are disjoint.
    background, kind : str
        The first photograph behind (a key of PHOTOGRAPHS, also where it has faded to grey) and its kind (of KINDS).
    ground : ndarray of uint8, shape (height, width)
        Kind of the photograph at each pixel, also behind digits, as its place in KINDS.
    """

    image: np.ndarray
    digits: tuple[Digit, ...]
    background: str
    kind: str
    ground: np.ndarray


def _tones(config: DigitsConfig) -> np.ndarray:
    """Table (256,) uint8 that fades a photograph to grey and leaves room for ink of one sign."""
    room = round(255 * config.contrast[1])
    low, high = {"light": (0, 255 - room), "dark": (room, 255), "either": (0, 255)}[config.sign]
    middle = (low + high) / 2
    full = low + np.arange(256) * (high - low) / 255
    return np.rint(middle + config.background * (full - middle)).astype(np.uint8)


def _shrink(photograph: np.ndarray, factor: int) -> np.ndarray:
    """Average blocks of factor x factor pixels, (h, w, 3) uint8 -> (h // factor, w // factor, 3) uint8."""
    h, w = photograph.shape[0] // factor, photograph.shape[1] // factor
    blocks = photograph[: h * factor, : w * factor].reshape(h, factor, w, factor, 3)
    return (blocks.sum(axis=(1, 3), dtype=np.uint32) // factor**2).astype(np.uint8)


def _views(photograph: np.ndarray, config: DigitsConfig) -> list[np.ndarray]:
    """Toned sizes of a photograph that hold a whole picture; one too small even unshrunk is continued by mirroring."""
    toned = _tones(config)[photograph]
    views = [_smooth(_shrink(toned, factor), config.blur) for factor in _SHRINKS]
    fitting = [view for view in views if view.shape[0] >= config.height and view.shape[1] >= config.width]
    missing = [max(0, need - have) for need, have in zip((config.height, config.width), toned.shape, strict=False)]
    return fitting or [np.pad(views[0], ((0, missing[0]), (0, missing[1]), (0, 0)), mode="symmetric")]


def _smooth(photograph: np.ndarray, deviation: int) -> np.ndarray:
    """Smooth (h, w, 3) uint8 by a Gaussian, approximated by boxes in integers."""
    if not deviation:
        return photograph
    return np.asarray(Image.fromarray(photograph).filter(ImageFilter.GaussianBlur(deviation)))


def _stamp(glyph: np.ndarray, size: int) -> np.ndarray:
    """Smoothly enlarge a glyph (10, 10) to ink coverage (size, size) uint16, 0 to 256, rims one pixel wide."""
    grown = Image.fromarray(glyph).resize((size, size), Image.Resampling.BICUBIC, box=(0.5, 0.5, 9.5, 9.5))
    ink = np.asarray(grown, dtype=np.int32)
    steep = (ink - 100) * 256 * size // (9 * 240) + 128  # at 8 pixels not even bare paper is below 32
    return np.where((steep < 32) | (ink < 16), 0, np.minimum(steep, 256)).astype(np.uint16)


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _kind(photograph: str) -> int:
    return KINDS.index(PHOTOGRAPHS[photograph])


@dataclass
class _Canvas:
    """A scene in the making."""

    image: np.ndarray  # (height, width, 3) uint8
    owner: np.ndarray  # (height, width) uint8: 0 background, k the k-th digit
    labels: list[int]
    areas: np.ndarray  # (100,) ink pixels of the k-th digit before any was hidden

    def hides_too_much(self, place: tuple[slice, slice], ink: np.ndarray, limit: float) -> bool:
        """Whether ink (size, size) bool at place would leave an earlier digit with more than ``limit`` hidden."""
        covered = np.bincount(self.owner[place][ink], minlength=100)
        covered[0] = 0
        seen = np.bincount(self.owner.ravel(), minlength=100)
        return bool(((seen - covered < (1 - limit) * self.areas) & (covered > 0)).any())


class Painter:
    """Paints scenes of one configuration from one split's material.

    Parameters
    ----------
    config : DigitsConfig
    material : Material
    """

    def __init__(self, config: DigitsConfig, material: Material) -> None:
        self.config = config
        self._glyphs = [material.glyphs[material.labels == label] for label in range(10)]
        self._views = [(name, _views(photograph, config)) for name, photograph in material.photographs.items()]

    def render(self, rng: np.random.Generator, first: int | None = None) -> Scene:
        """Paint one scene.

        Parameters
        ----------
        rng : numpy.random.Generator
            Source of every choice; background and noise are drawn before the digits.
        first : int, optional
            Label of the first digit; drawn at random if not given.

        Returns
        -------
        Scene
            A digit that finds no place within ``max_overlap`` is left out (never the first).
        """
        name, image = self._background(rng)
        ground = np.full(image.shape[:2], _kind(name), dtype=np.uint8)
        for _ in range(self.config.photographs - 1):
            self._replace_half(rng, image, ground)
        noise = self._noise(rng)
        canvas = _Canvas(image, np.zeros(image.shape[:2], dtype=np.uint8), [], np.zeros(100, dtype=np.int64))
        for number in range(rng.integers(self.config.digits[0], self.config.digits[1] + 1)):
            label = int(rng.integers(10))
            self._add(rng, canvas, first if number == 0 and first is not None else label)
        if noise is not None:
            image = np.clip(image + noise, 0, 255).astype(np.uint8)
        masks = [canvas.owner == number for number in range(1, len(canvas.labels) + 1)]
        digits = tuple(Digit(label, _box(mask), mask) for label, mask in zip(canvas.labels, masks, strict=True))
        return Scene(image, digits, name, PHOTOGRAPHS[name], ground)

    def _background(self, rng: np.random.Generator) -> tuple[str, np.ndarray]:
        """Cut a picture from a random photograph at a random place and shrink, mirrored half of the time."""
        name, views = self._views[rng.integers(len(self._views))]
        view = views[rng.integers(len(views))]
        y = rng.integers(view.shape[0] - self.config.height + 1)
        x = rng.integers(view.shape[1] - self.config.width + 1)
        crop = view[y : y + self.config.height, x : x + self.config.width]
        return name, (crop[:, ::-1] if rng.integers(2) else crop).copy()

    def _replace_half(self, rng: np.random.Generator, image: np.ndarray, ground: np.ndarray) -> None:
        """Paint another photograph on one side of a line through a point of the middle."""
        name, other = self._background(rng)
        height, width = ground.shape
        y, x = rng.integers(height // 4, height - height // 4), rng.integers(width // 4, width - width // 4)
        dy, dx = rng.integers(-8, 8, size=2) * 2 + 1  # odd, so never both zero
        side = (np.arange(height)[:, None] - y) * dy + (np.arange(width) - x) * dx > 0
        image[side], ground[side] = other[side], _kind(name)

    def _noise(self, rng: np.random.Generator) -> np.ndarray | None:
        width = round(255 * self.config.noise)
        shape = (self.config.height, self.config.width, 3)
        return rng.integers(-width, width + 1, size=shape, dtype=np.int16) if width else None

    def _add(self, rng: np.random.Generator, canvas: _Canvas, label: int) -> None:
        """Paint a digit on the canvas, or leave it as it is if no place is found."""
        size = int(rng.integers(self.config.digit_size[0], self.config.digit_size[1] + 1))
        glyphs = self._glyphs[label]
        stamp = _stamp(glyphs[rng.integers(len(glyphs))], size)
        ink = stamp > 0
        place = self._place(rng, canvas, ink)
        if place is None:
            return
        patch, cover = canvas.image[place], stamp[..., None]
        patch[:] = (patch * (256 - cover) + self._ink(rng, patch) * cover + 128) >> 8  # uint16: at most 65,408
        canvas.labels.append(label)
        canvas.areas[len(canvas.labels)] = ink.sum()
        canvas.owner[place][ink] = len(canvas.labels)

    def _place(self, rng: np.random.Generator, canvas: _Canvas, ink: np.ndarray) -> tuple[slice, slice] | None:
        """Find a window for ink (size, size) that hides no earlier digit too much."""
        size = len(ink)
        for _ in range(_TRIES):
            y = int(rng.integers(self.config.height - size + 1))
            x = int(rng.integers(self.config.width - size + 1))
            place = (slice(y, y + size), slice(x, x + size))
            if not canvas.labels or not canvas.hides_too_much(place, ink, self.config.max_overlap):
                return place
        return None

    def _ink(self, rng: np.random.Generator, patch: np.ndarray) -> np.ndarray:
        """Choose an ink (3,) uint16 that stands out from the patch's mean by the contrast drawn."""
        config = self.config
        mean = int(patch.sum()) // patch.size
        least, most = (round(255 * share) for share in config.contrast)
        step = int(rng.integers(least, most + 1))
        lighter = rng.integers(2) == 0 if config.sign == "either" else config.sign == "light"
        if config.sign == "either" and not step <= (255 - mean if lighter else mean):
            lighter = mean < 128  # no room on the side drawn
        shift = round(255 * config.colour)
        ink = mean + (step if lighter else -step) + rng.integers(-shift, shift + 1, size=3)
        return np.clip(ink, 0, 255).astype(np.uint16)
