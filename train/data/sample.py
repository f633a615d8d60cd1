"""What the parts of segmentation pass on: classes, vocabularies, samples.

A *source* is any map-style object with ``vocabulary``, ``task`` ("semantic", "instance" or "panoptic"), ``__len__``,
``load(index, epoch=0) -> Sample``, ``name(index) -> str`` and ``order(generator)``, the order of one epoch. A *label*
is a class's place in the vocabulary, an *id* the number it has in the data set's own files.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

TASKS = ("semantic", "instance", "panoptic")


@dataclass(frozen=True)
class ClassInfo:
    """One class: its name, its id in the data set's files, whether it is countable, and a colour (r, g, b) to draw."""

    name: str
    id: int
    is_thing: bool
    color: tuple[int, int, int] | None


@dataclass(frozen=True)
class Vocabulary:
    """The classes of a data set; a class's label is its place, 0 to C - 1."""

    classes: tuple[ClassInfo, ...]
    name: str

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.classes)

    @cached_property
    def things(self) -> frozenset[int]:
        """Labels of the countable classes."""
        return frozenset(label for label, each in enumerate(self.classes) if each.is_thing)

    @cached_property
    def label_of(self) -> dict[int, int]:
        """Map the ids of the data set's files to labels."""
        return {each.id: label for label, each in enumerate(self.classes)}


@dataclass(frozen=True)
class Sample:
    """One picture and what is to be found in it.

    Semantic data have one mask per class present, instance data one per object; panoptic data one per object of a
    countable class and one per other class.

    Attributes
    ----------
    image : ndarray of uint8, shape (H, W, 3)
        RGB.
    masks : ndarray of bool, shape (g, H, W)
    labels : ndarray of int64, shape (g,)
    crowd : ndarray of bool, shape (g,)
        Masks of several objects that nobody has told apart: neither trained on nor counted as misses.
    ignore : ndarray of bool, shape (H, W)
        Pixels that are ignored.
    name : str
        Image id or file stem.
    """

    image: np.ndarray
    masks: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    ignore: np.ndarray
    name: str
