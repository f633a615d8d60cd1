"""Pictures with an annotation file each, whatever its format: objects with a class's name and an outline or a box.

LABELS, a text file in the data's folder with a class a line, fixes which classes there are and in which order; without
it they are the names that the annotation files hold, sorted. ``__ignore__``, ``_background_`` and ``background``, which
labelme and others write there, are no classes: what is outlined as the first is ignored, as the others left out.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..common.errors import UserError, one_line
from .coco import MOST_BYTES
from .coco_json import check_names, read_text, text
from .coco_masks import box_to_mask, to_mask
from .mask_files import DataError, check_size, read_picture
from .sample import ClassInfo, Sample, Vocabulary

LABELS = "labels.txt"
IGNORED, NOTHING = -1, -2  # labels of no class
NO_CLASS = {"__ignore__": IGNORED, "_background_": NOTHING, "background": NOTHING}
BACKGROUND = ClassInfo("background", 0, False, None)


@dataclass(frozen=True)
class Shape:
    """One object: its class, its polygons [x0, y0, x1, ...] or its box [x, y, width, height], and where it is written.

    Coordinates are in pixels; the picture's top left corner is 0, 0.
    """

    name: str
    place: str
    polygons: tuple[list[float], ...] = ()
    box: list[float] | None = None
    crowd: bool = False

    def draw(self, height: int, width: int) -> np.ndarray:
        """Draw the object, (H, W) bool; what reaches out of the picture is cut off.

        Raises
        ------
        ValueError
            It is broken, or a part of it lies outside the picture.
        """
        for outline in self.outlines():
            for values, side in ((outline[::2], width), (outline[1::2], height)):
                if values and (max(values) <= 0 or min(values) >= side):
                    raise ValueError(f"it lies outside the picture of {width} x {height}")
        return box_to_mask(self.box, height, width) if self.box else to_mask(list(self.polygons), height, width)

    def outlines(self) -> list[list[float]]:
        """List corners x0, y0, x1, ... of each part; of a box two."""
        if not self.box:
            return list(self.polygons)
        x, y, wide, high = self.box
        return [[x, y, x + wide, y + high]]


@dataclass(frozen=True)
class Annotation:
    """What an annotation file says: its picture's file, the size (H, W) it should have, and the objects."""

    picture: Path
    size: tuple[int, int]
    shapes: list[Shape]


class ShapeSource:
    """Pictures with an annotation file each; a file is read anew whenever its picture is.

    Parameters
    ----------
    files : list of (name, Path)
        Each picture's name and annotation file.
    read : callable
        Reads an annotation file, Path -> Annotation; raises DataError.
    classes : list of str
        Names.
    name : str
        Of the data set.
    task : {"instance", "semantic"}
        Semantic: where objects overlap, the later one is seen; the rest is the class background.
    notes : list of str
        What is worth knowing of how they are read.
    """

    def __init__(self, files, read: Callable[[Path], Annotation], classes: list[str], name: str, task: str, notes=()):
        self.files, self.read, self.task, self.notes = files, read, task, list(notes)
        infos = [ClassInfo(each, number, True, None) for number, each in enumerate(classes, 1)]
        self.vocabulary = Vocabulary((*[BACKGROUND] * (task == "semantic"), *infos), name)
        self.labels = {each.name: label for label, each in enumerate(self.vocabulary.classes)} | NO_CLASS

    def __len__(self):
        return len(self.files)

    def name(self, index: int) -> str:
        """Return a picture's name."""
        return self.files[index][0]

    def order(self, generator: np.random.Generator) -> np.ndarray:
        """Draw one epoch's order of the pictures, (n,) int64."""
        return generator.permutation(len(self))

    def load(self, index: int, epoch: int = 0) -> Sample:
        """Read a picture and draw its objects, the same in every epoch.

        Raises
        ------
        DataError
            A file is missing or unreadable, the sizes differ, or an object cannot be used.
        """
        name, path = self.files[index]
        found = self.read(path)
        if not os.path.isfile(found.picture):
            raise DataError("missing picture", f"no picture {found.picture}, named in {path}: put it there")
        image = read_picture(found.picture)
        check_size(found.size, path, image.shape[:2], found.picture)
        if len(found.shapes) * image[..., 0].size > MOST_BYTES:
            message = f"{path} has {len(found.shapes):,} objects, too many to hold: cut the picture up"
            raise DataError("too many annotations", message)
        labels = np.array([self.label(shape, path) for shape in found.shapes], dtype=np.int64)
        crowd = np.array([shape.crowd for shape in found.shapes], dtype=bool)
        masks = np.zeros((len(labels), *image.shape[:2]), dtype=bool)
        for mask, shape in zip(masks, found.shapes, strict=True):
            try:
                mask[:] = shape.draw(*image.shape[:2])
            except (ValueError, TypeError) as error:
                message = f"{path}: {shape.place}: {one_line(error)}; correct or remove it"
                raise DataError("broken shape", message) from error
        if self.task == "semantic":
            return Sample(image, *paint(masks, labels), name)
        kept, ignore = labels >= 0, masks[labels == IGNORED].any(axis=0)
        return Sample(image, masks[kept], labels[kept], crowd[kept], ignore, name)

    def label(self, shape: Shape, path: Path) -> int:
        """Return the label of an object, or raise an error if its class is unknown."""
        if shape.name not in self.labels:
            message = f"{path}: {shape.place} is of class {shape.name!r}, which is not known: correct it"
            raise DataError("unknown class", f"{message}, or add the class to {LABELS}")
        return self.labels[shape.name]


def paint(masks: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Paint objects one over the other on background, label 0: masks of the classes seen, labels, crowd, ignore."""
    seen = np.zeros(masks.shape[1:], dtype=np.int64)
    for mask, label in zip(masks, labels, strict=True):
        seen[mask] = 0 if label == NOTHING else label
    present = np.unique(seen[seen != IGNORED])
    return seen == present[:, None, None], present, np.zeros(len(present), dtype=bool), seen == IGNORED


def class_names(root: Path, files: list[Path], read: Callable[[Path], Annotation]) -> list[str]:
    """Read the classes' names from LABELS, or from all annotation files; unreadable ones are met again later.

    Raises
    ------
    UserError
        There is no name.
    """
    if os.path.isfile(root / LABELS):
        return read_labels(root / LABELS)
    found, first = set(), None
    for path in tqdm(files, f"looking for classes ({LABELS} would save this)", leave=False, disable=None):
        try:
            found.update(shape.name for shape in read(path).shapes)
        except DataError as error:
            first = first or error
    found -= NO_CLASS.keys()
    if not found:
        reason = f" ({first})" if first else ""
        raise UserError(f"no object in the {len(files)} annotation files of {root}{reason}: there is nothing to learn")
    return sorted(found)


def read_labels(path: Path) -> list[str]:
    """Read LABELS."""
    lines = [line.strip() for line in read_text(path, "a class a line").splitlines()]
    names = [line for line in lines if line and line not in NO_CLASS]
    if not names:
        raise UserError(f"{path} names no class: write one a line")
    check_names(names, path)
    return names


def class_name(value) -> str:
    """Take the name of an object's class, without spaces around it."""
    try:
        return text(value).strip()
    except ValueError as error:
        raise ValueError("its class has no name") from error
