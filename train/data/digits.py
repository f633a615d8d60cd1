"""Scattered Digits: handwritten digits on photographs, all from installed packages, with exact masks.

Backgrounds are photographs that ship inside scikit-image and scikit-learn, digits are scikit-learn's 8 x 8 scans.
A picture is a function of (configuration, split, seed, index) alone: the same on every machine, in any order, in any
worker. Training and validation share neither a digit nor a pixel of a photograph (:mod:`train.data.digit_parts`).
How hard the pictures are is set by :class:`DigitsConfig`; how one is painted is in :mod:`train.data.digit_painter`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from .digit_config import CLASSES, LEVELS, DigitsConfig
from .digit_painter import Digit, Painter, Scene
from .digit_parts import SPLITS, load_material

__all__ = ["CLASSES", "LEVELS", "Digit", "DigitsConfig", "Painter", "ScatteredDigits", "Scene"]


class ScatteredDigits(Dataset):
    """Map-style data set: item ``index`` is (picture, which digit is in it).

    Labels go 0, 1, ... 9, 0, ... with the index, so every ten consecutive items are balanced; let the loader shuffle.
    The number of different pictures is not limited: for a fresh picture at every step, set ``length`` to that of the
    whole run.

    Parameters
    ----------
    config : DigitsConfig
        With ``digits`` other than (1, 1) only :meth:`scene` can be used.
    split : {"train", "val"}
    length : int
        Number of items.
    seed : int
        Not negative.
    transform : callable, optional
        Given the PIL picture (RGB); its result stands in the item instead.

    Raises
    ------
    ValueError
        Unknown split, negative seed, or no items.
    """

    def __init__(
        self,
        config: DigitsConfig,
        split: str,
        length: int,
        seed: int = 0,
        transform: Callable[[Image.Image], Any] | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        if length < 1 or seed < 0:
            raise ValueError(f"length must be at least 1 and seed at least 0, got length {length}, seed {seed}")
        self.config, self.split, self.length, self.seed, self.transform = config, split, length, seed, transform
        self.classes = list(CLASSES)
        self._painter = Painter(config, load_material(split, config.backgrounds))

    def __len__(self) -> int:
        return self.length

    def scene(self, index: int) -> Scene:
        """Render item ``index`` with its masks and boxes; with several digits the others' labels are random."""
        if not 0 <= index < self.length:
            raise IndexError(f"index must lie in 0 to {self.length - 1}, got {index}")
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), index))
        return self._painter.render(rng, first=index % len(CLASSES))

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if self.config.digits != (1, 1):
            raise ValueError(f"classification needs digits (1, 1), got {self.config.digits}: use scene(index)")
        scene = self.scene(index)
        picture = Image.fromarray(scene.image)
        return (picture if self.transform is None else self.transform(picture)), scene.digits[0].label
