"""What is done to pictures and masks before training and testing.

The part of the picture that will be seen is cut out first and only then scaled, so that no mask is ever larger than
the crop. Crops are filled up to their fixed size at the right and at the bottom with the mean colour; that padding
belongs to no mask. Masks are boolean; a pixel of a scaled mask is the nearest pixel of the original.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import Image, Mask

from fast.matching import Objects

from .normalization import normalise
from .sample import Sample

SMALLEST = 32  # what the network takes, pixels
TRIES = 10  # crops drawn until none is filled by one class


@dataclass(frozen=True)
class ShortSide:
    """Scale the short side to a multiple of ``base`` drawn from ``scales`` in steps of a tenth.

    This and the next are called with (height, width) and give the new (height, width), drawn from Python's generator.
    They are classes, as loader processes may have to pickle them.

    Parameters
    ----------
    base : int
        Pixels.
    scales : tuple of float
        Least and greatest multiple.
    longest : int, optional
        Most pixels of the long side, whatever the multiple; default 4 x base.
    """

    base: int
    scales: tuple[float, float] = (0.5, 2.0)
    longest: int | None = None

    def __call__(self, height: int, width: int) -> tuple[int, int]:
        tenths = range(round(10 * self.scales[0]), round(10 * self.scales[1]) + 1)
        return fit_sides(height, width, self.base * random.choice(tenths) / 10, self.longest or 4 * self.base)


@dataclass(frozen=True)
class LargeJitter:
    """Fit the picture into ``size`` (height, width) times a uniform multiple (large-scale jitter)."""

    size: tuple[int, int]
    scales: tuple[float, float] = (0.1, 2.0)

    def __call__(self, height: int, width: int) -> tuple[int, int]:
        return scaled(height, width, random.uniform(*self.scales) * min(self.size[0] / height, self.size[1] / width))


def unscaled(height: int, width: int) -> tuple[int, int]:
    """Leave the picture at its size."""
    return height, width


def fit_sides(height: int, width: int, short: float, longest: float) -> tuple[int, int]:
    """Scale the short side to ``short``, or the long side to ``longest`` where it would become longer."""
    return scaled(height, width, min(short / min(height, width), longest / max(height, width)))


def scaled(height: int, width: int, factor: float) -> tuple[int, int]:
    """Scale both sides, each at least one pixel."""
    return max(1, round(height * factor)), max(1, round(width * factor))


def ssd_jitter() -> v2.Transform:
    """Create SSD's colour distortion: brightness by 32/255, contrast and saturation 0.5 to 1.5, hue by 36 degrees.

    Each with probability one half, contrast either before or after saturation and hue. Brightness is multiplied, as
    torchvision does it; SSD adds.
    """
    options = {"brightness": 32 / 255, "contrast": 0.5, "saturation": 0.5, "hue": 0.1}
    parts = {name: v2.RandomApply([v2.ColorJitter(**{name: value})]) for name, value in options.items()}
    orders = [("brightness", "contrast", "saturation", "hue"), ("brightness", "saturation", "hue", "contrast")]
    return v2.RandomChoice([v2.Compose([parts[name] for name in order]) for order in orders])


class TrainTransform:
    """Scale, crop, jitter, flip, normalise and pad one sample.

    All randomness comes from Python's and torch's generators, which ``isolated_random`` seeds.

    Parameters
    ----------
    resize : callable
        (height, width) -> scaled (height, width): ``ShortSide``, ``LargeJitter`` or ``unscaled``.
    crop : tuple of int
        (height, width) of what the network sees, pixels.
    most_of_one : float
        Largest share of a crop's annotated pixels that one class may take (0.75 in some recipes; 1: no matter); after
        ten tries the last crop is taken as it is.
    jitter : bool
        Whether colours are distorted as SSD does.
    flip : float
        Probability of a horizontal flip.
    """

    def __init__(
        self,
        resize: Callable,
        crop: tuple[int, int],
        most_of_one: float = 1.0,
        jitter: bool = False,
        flip: float = 0.5,
    ):
        self.resize, self.crop, self.most_of_one = resize, crop, most_of_one
        steps = [ssd_jitter()] if jitter else []
        self.change = v2.Compose([*steps, v2.RandomHorizontalFlip(flip)])

    def __call__(self, sample: Sample) -> tuple[Tensor, Objects]:
        """Create the network's input.

        Parameters
        ----------
        sample : Sample

        Returns
        -------
        image : float32 tensor, shape (3, height, width)
            Normalised.
        objects : Objects
            Masks bool (g, height, width) and labels int64 (g,) of what is still to be seen; crowds are left out.
        """
        size = self.resize(*sample.image.shape[:2])
        window = self.choose_window(sample, size)
        target = [min(have, want) for have, want in zip(size, self.crop, strict=True)]
        image = cut(torch.tensor(sample.image).permute(2, 0, 1), window, target, v2.InterpolationMode.BILINEAR)
        top, left, height, width = window
        inside = sample.masks[:, top : top + height, left : left + width]
        chosen = ~sample.crowd & inside.any(axis=(1, 2))
        whole = (0, 0, height, width)
        masks = cut(torch.from_numpy(inside[chosen]), whole, target, v2.InterpolationMode.NEAREST_EXACT)
        image, masks = self.change(Image(image), Mask(masks))
        masks = pad(masks.as_subclass(Tensor), self.crop)
        seen = masks.flatten(1).any(dim=1)
        labels = torch.from_numpy(sample.labels[chosen])
        return pad(normalise(image.as_subclass(Tensor)), self.crop), Objects(labels[seen], masks[seen])

    def choose_window(self, sample: Sample, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Draw the part of the original picture that will be seen: top, left, height, width in its pixels."""
        for _ in range(TRIES):
            window = draw_window(sample.image.shape[:2], size, self.crop)
            if self.most_of_one >= 1 or largest_share(sample, window) < self.most_of_one:
                break
        return window


def draw_window(original: tuple[int, int], size: tuple[int, int], crop: tuple[int, int]) -> tuple[int, int, int, int]:
    """Draw a crop of a picture scaled from ``original`` to ``size``, in pixels of the original."""
    starts, lengths = [], []
    for have, new, want in zip(original, size, crop, strict=True):
        start = random.randint(0, max(0, new - want))
        first, last = round(start * have / new), round(min(start + want, new) * have / new)
        starts.append(min(first, have - 1))
        lengths.append(max(1, last - starts[-1]))
    return (*starts, *lengths)


def largest_share(sample: Sample, window: tuple[int, int, int, int]) -> float:
    """Return the share of the largest class in what is annotated of a window; 1 where at most one class is there."""
    top, left, height, width = window
    areas = sample.masks[:, top : top + height, left : left + width].sum(axis=(1, 2))
    areas = np.bincount(sample.labels, weights=areas) if len(areas) else np.zeros(1)
    return float(areas.max() / areas.sum()) if np.count_nonzero(areas) > 1 else 1.0


def cut(maps: Tensor, window: tuple[int, int, int, int], size: list[int], mode: v2.InterpolationMode) -> Tensor:
    """Cut a window out of maps (c, H, W) and scale it; none -> none."""
    if not len(maps):
        return maps.new_zeros(0, *size)
    return F.resized_crop(maps, *window, size, interpolation=mode, antialias=True)


def pad(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Fill maps (c, h, w) with zeros at the right and at the bottom, to at least ``size``."""
    height, width = maps.shape[1:]
    if height >= size[0] and width >= size[1]:
        return maps
    return torch.nn.functional.pad(maps, (0, max(0, size[1] - width), 0, max(0, size[0] - height)))


@dataclass(frozen=True)
class Prepared:
    """A picture ready for testing: image (3, H, W) float32; (h, w), the part that is no padding; whether mirrored."""

    image: Tensor
    size: tuple[int, int]
    flipped: bool = False


class EvalTransform:
    """Scale a picture for testing and normalise it; sides below what the network takes are filled up.

    Parameters
    ----------
    short : int, optional
        Short side, pixels; by default pictures stay at their size.
    longest : int, optional
        Most pixels of the long side; by default 4 x the short one.
    """

    def __init__(self, short: int | None = None, longest: int | None = None):
        self.short, self.longest = short, longest or 4 * (short or 0)

    def __call__(self, picture: np.ndarray, scale: float = 1, flipped: bool = False) -> Prepared:
        """Prepare a picture (H, W, 3) uint8, at a multiple of the size for testing, and mirrored if asked."""
        height, width = picture.shape[:2]
        size = fit_sides(height, width, self.short, self.longest) if self.short else (height, width)
        size = scaled(*size, scale)
        image = torch.tensor(picture[:, ::-1].copy() if flipped else picture).permute(2, 0, 1)
        image = cut(image, (0, 0, height, width), list(size), v2.InterpolationMode.BILINEAR)
        return Prepared(pad(normalise(image), (SMALLEST, SMALLEST)), size, flipped)
