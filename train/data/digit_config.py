"""How hard Scattered Digits are: what one can set (:class:`DigitsConfig`), and four settings (:data:`LEVELS`)."""

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from .digit_parts import BACKGROUNDS

CLASSES = tuple("0123456789")


@dataclass(frozen=True)
class DigitsConfig:
    """How the pictures look: the dial of difficulty.

    Parameters
    ----------
    height, width : int
        Picture size in pixels, 16 to 4096.
    digits : tuple of int
        Fewest and most digits in a picture, at most 99; classification needs (1, 1), (0, 0) gives bare backgrounds.
    digit_size : tuple of int
        Smallest and largest side of a digit, pixels, at least 8.
    background : float
        0 is flat grey, 1 the full photograph, between them the photograph fades.
    contrast : tuple of float
        Least and greatest step from the local mean brightness to the ink, as a share of black to white.
    sign : {"light", "dark", "either"}
        Whether ink is lighter than its surroundings, darker, or drawn anew for each digit. With one sign the
        background's tones are compressed to leave the ink room.
    colour : float
        Greatest shift of each ink channel, as a share of black to white; 0 is grey ink.
    noise : float
        Half-width of the uniform noise on each channel of each pixel, as a share of black to white.
    max_overlap : float
        Largest part of a digit that digits painted after it may hide, 0 to 0.9.
    photographs : int
        Photographs in a picture, 1 to 4, apart at straight lines; two of the same kind may meet.
    backgrounds : {"scenes", "textures"}
        Photographs of all sorts, or six that look alike all over, one of each kind.
    blur : int
        Standard deviation of the Gaussian that smooths the photographs, pixels of the picture; 0 leaves them sharp.
    """

    height: int = 64
    width: int = 64
    digits: tuple[int, int] = (1, 1)
    digit_size: tuple[int, int] = (24, 40)
    background: float = 0.4
    contrast: tuple[float, float] = (0.4, 0.6)
    sign: Literal["light", "dark", "either"] = "light"
    colour: float = 0.0
    noise: float = 0.02
    max_overlap: float = 0.2
    photographs: int = 1
    backgrounds: Literal["scenes", "textures"] = "scenes"
    blur: int = 0

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            _check_number(name, getattr(self, name), 16, 4096, whole=True)
        _check_number("photographs", self.photographs, 1, 4, whole=True)
        _check_number("blur", self.blur, 0, 256, whole=True)
        side = min(self.height, self.width)
        for name, low, high in (("digits", 0, 99), ("digit_size", 8, side), ("contrast", 0.05, 0.95)):
            pair = _checked_pair(name, getattr(self, name), low, high, whole=name != "contrast")
            object.__setattr__(self, name, pair)
        for name, high in (("background", 1), ("colour", 1), ("noise", 1), ("max_overlap", 0.9)):
            _check_number(name, getattr(self, name), 0, high)
        if self.sign not in ("light", "dark", "either"):
            raise ValueError(f"sign must be light, dark or either, got {self.sign!r}")
        if self.backgrounds not in BACKGROUNDS:
            raise ValueError(f"backgrounds must be {' or '.join(BACKGROUNDS)}, got {self.backgrounds!r}")


def _check_number(name: str, value: Any, low: float, high: float, whole: bool = False) -> None:
    if not isinstance(value, Integral if whole else Real) or not low <= value <= high:
        raise ValueError(f"{name} must be a {'whole ' * whole}number from {low} to {high}, got {value!r}")


def _checked_pair(name: str, value: Any, low: float, high: float, whole: bool) -> tuple:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f"{name} must be two numbers, smallest and largest, got {value!r}")
    for number in value:
        _check_number(name, number, low, high, whole)
    if value[0] > value[1]:
        raise ValueError(f"{name} must name the smallest first, got {value!r}")
    return tuple(value)


LEVELS = {
    "flat": DigitsConfig(background=0.0, contrast=(0.5, 0.7), noise=0.0),
    "easy": DigitsConfig(),
    "medium": DigitsConfig(digit_size=(20, 36), background=0.7, contrast=(0.3, 0.5), noise=0.04),
    "hard": DigitsConfig(
        digit_size=(16, 32), background=1.0, contrast=(0.25, 0.45), sign="either", colour=0.2, noise=0.06
    ),
}
