"""Masks drawn as numbers: which number is which class, object, ignored or unknown."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .mask_files import DataError, check_size, read_ids, read_picture
from .sample import Sample, Vocabulary

PER_CLASS = 1000  # Cityscapes: object number n of class c is drawn as 1000 c + n
SMALL = 1 << 16  # numbers below are looked up in a table


@dataclass(frozen=True)
class CategoryMap:
    """What the numbers of a data set's masks mean; any other number is unknown.

    Parameters
    ----------
    vocabulary : Vocabulary
    ignored : frozenset of int
        Pixels that are ignored.
    background : frozenset of int
        Known classes that are not asked for: part of no mask, yet evaluated.
    numbered : bool
        Whether c * 1000 + n draws object n of class c; the bare number c of a countable class then draws a crowd.
    advice : str
        What to do about unknown numbers.
    """

    vocabulary: Vocabulary
    ignored: frozenset[int]
    background: frozenset[int] = frozenset()
    numbered: bool = False
    advice: str = "correct the mask"

    def class_id(self, value: int) -> int:
        """Return the class's id in a pixel's number."""
        return value // PER_CLASS if self.numbered and value >= PER_CLASS else value

    def part(self, value: int, task: str) -> tuple[int, int, bool]:
        """Return which mask a known number belongs to: (label, object number or -1, crowd)."""
        label = self.vocabulary.label_of[self.class_id(value)]
        if task == "semantic" or label not in self.vocabulary.things:
            return label, -1, False
        return (label, value, False) if value >= PER_CLASS else (label, -1, True)


def read_sample(picture: Path, mask: Path, table: CategoryMap, task: str, name: str) -> Sample:
    """Read a picture and its mask of numbers.

    Raises
    ------
    DataError
        A file is missing or unreadable, the sizes differ, or the mask holds unknown numbers.
    """
    image, ids = read_picture(picture), read_ids(mask)
    check_size(ids.shape, mask, image.shape[:2], picture)
    values, counts, places = distinct(ids)
    classes = [table.class_id(int(value)) for value in values]
    known = table.vocabulary.label_of.keys() | table.ignored | table.background
    unknown = {i: int(n) for i, c, n in zip(values.tolist(), classes, counts, strict=True) if c not in known}
    if unknown:
        raise unknown_ids(mask, unknown, table.vocabulary, table.advice)
    parts = [
        None if c not in table.vocabulary.label_of else table.part(value, task)
        for value, c in zip(values.tolist(), classes, strict=True)
    ]
    ignore = np.array([c in table.ignored for c in classes])[places]
    return Sample(image, *split(places, parts), ignore, name)


def unknown_ids(mask: Path, unknown: dict[int, int], vocabulary: Vocabulary, advice: str) -> DataError:
    """Name the numbers that stand for no class."""
    listed = ", ".join(f"{i} ({n} pixels)" for i, n in list(unknown.items())[:5]) + ", ..." * (len(unknown) > 5)
    message = f"{mask} has ids outside the {vocabulary.num_classes} classes: {listed}; {advice}"
    return DataError("ids outside the class list", message, unknown)


def distinct(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find a mask's numbers, ids (H, W) -> values (m,) ascending, pixels of each (m,), place of each pixel's (H, W)."""
    if ids.min() < 0 or ids.max() >= SMALL:
        values, places, counts = np.unique(ids, return_inverse=True, return_counts=True)
        return values, counts, places.reshape(ids.shape)
    counts = np.bincount(ids.ravel())
    values = np.flatnonzero(counts)
    table = np.zeros(len(counts), dtype=np.int64)
    table[values] = np.arange(len(values))
    return values, counts[values], table[ids]


def split(places: np.ndarray, parts: list[tuple[int, int, bool] | None]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Create one mask of all numbers that belong to the same part.

    Parameters
    ----------
    places : ndarray of int64, shape (H, W)
        Place of each pixel's number among the m numbers present.
    parts : list of (label, object number, crowd) or None, one for each number
        None: in no mask.

    Returns
    -------
    masks : ndarray of bool, shape (g, H, W)
    labels : ndarray of int64, shape (g,)
    crowd : ndarray of bool, shape (g,)
    """
    found = list(dict.fromkeys(part for part in parts if part is not None))
    place_of = {part: place for place, part in enumerate(found)} | {None: -1}
    number = np.array([place_of[part] for part in parts], dtype=np.int64)[places]
    masks = number == np.arange(len(found))[:, None, None]
    return masks, np.array([p[0] for p in found], dtype=np.int64), np.array([p[2] for p in found], dtype=bool)


class MaskSource:
    """Pictures with masks of numbers.

    Parameters
    ----------
    files : list of (name, picture, mask)
    table : CategoryMap
    task : str
    notes : list of str
        What is worth knowing of how they are read.
    """

    def __init__(self, files: list[tuple[str, Path, Path]], table: CategoryMap, task: str, notes: list[str] = ()):
        self.notes = list(notes)
        self.files, self.table, self.task, self.vocabulary = files, table, task, table.vocabulary

    def __len__(self):
        return len(self.files)

    def name(self, index: int) -> str:
        """Return a picture's name."""
        return self.files[index][0]

    def missing(self) -> list[int]:
        """List the numbers of the pictures that are not there, or whose masks are not."""
        return [i for i, (_, *paths) in enumerate(self.files) if not all(map(os.path.isfile, paths))]

    def find_picture(self, index: int) -> Path:
        """Return the path of a picture, or name it or its mask if one of them is not there."""
        _, picture, mask = self.files[index]
        for path, what in ((picture, "picture"), (mask, "mask")):
            if not os.path.isfile(path):
                raise DataError(f"missing {what}", f"no {what} {path}: put it there")
        return picture

    def load(self, index: int, epoch: int = 0) -> Sample:
        """Read a picture and its masks, the same in every epoch."""
        name, picture, mask = self.files[index]
        return read_sample(picture, mask, self.table, self.task, name)

    def order(self, generator: np.random.Generator) -> np.ndarray:
        """Draw one epoch's order of the pictures, (n,) int64."""
        return generator.permutation(len(self))
