"""Pascal VOC's layout.

::

    DATA/JPEGImages/a.jpg
    DATA/SegmentationClass/a.png, SegmentationObject/a.png   class and object numbers, 0 background, 255 ignored
    DATA/Annotations/a.xml                                   boxes, which are masks where asked for
    DATA/ImageSets/Segmentation/train.txt, val.txt           names; for boxes those under Main come first

Without ImageSets every tenth picture is for validation. Classes of masks are VOC's twenty, or those of labels.txt, the
first of which is drawn as 1; those of boxes are VOC's if there are no others, else the names in the xmls. Objects
marked difficult are neither trained on nor counted as misses.
"""

import os
from functools import partial
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

import numpy as np
from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring

from ..common.errors import UserError, one_line
from .annotations import BACKGROUND, LABELS, Annotation, Shape, ShapeSource, class_name, class_names, read_labels
from .category_maps import CategoryMap, MaskSource, distinct, split, unknown_ids
from .coco_json import flag, read_text
from .coco_layouts import NAMES
from .images import SUFFIXES, walk_files
from .mask_files import DataError, check_size, read_ids, read_picture
from .mask_folders import hold_out
from .sample import ClassInfo, Sample, Vocabulary

PICTURES, BOXES, CLASSES, OBJECTS = "JPEGImages", "Annotations", "SegmentationClass", "SegmentationObject"
NAMED = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
VOID = 255
MOST_XML = 1 << 22  # bytes


def is_voc(root: Path) -> bool:
    """Whether a folder is laid out as Pascal VOC's."""
    return (root / PICTURES).is_dir() and any((root / each).is_dir() for each in (BOXES, CLASSES))


def tasks_of(root: Path) -> tuple[str, ...]:
    """List what there is, the richest last; boxes count least where classes are drawn."""
    if not (root / CLASSES).is_dir():
        return ("instance",)
    return ("semantic", "instance") if (root / OBJECTS).is_dir() else ("instance", "semantic")


def open_voc(root: Path, split: str, task: str, boxes: bool = False):
    """Open one split.

    Parameters
    ----------
    root : Path
    split : {"train", "val"}
    task : {"semantic", "instance"}
    boxes : bool
        For instances: take the boxes of Annotations for masks.

    Raises
    ------
    UserError
        A folder or list is missing, or there are boxes only and ``boxes`` is false.
    """
    if task == "instance" and boxes:
        return open_boxes(root, split)
    if task == "instance" and not (root / OBJECTS).is_dir():
        advice = "pass --data.boxes true (check_data: --boxes) to take boxes for masks"
        raise UserError(f"{root} has boxes but no {OBJECTS}/, which outlines objects: {advice}")
    path = root / LABELS
    names = read_labels(path) if os.path.isfile(path) else NAMED
    infos = [ClassInfo(name, number, True, None) for number, name in enumerate(names, 1)]
    pictures, listed = list_pictures(root), list_names(root, split, ("Segmentation", "Main"), root / CLASSES, ".png")
    files = [(name, picture_of(name, pictures, root), root / CLASSES / f"{name}.png") for name in listed]
    advice = f"name the classes in {path}, a line each, or correct the mask"
    if task == "semantic":
        table = CategoryMap(Vocabulary((BACKGROUND, *infos), "voc"), frozenset({VOID}), advice=advice)
        return MaskSource(files, table, task)
    table = CategoryMap(Vocabulary(tuple(infos), "voc"), frozenset({VOID}), frozenset({0}), advice=advice)
    return ObjectSource(files, table, task, root)


def open_boxes(root: Path, split: str) -> ShapeSource:
    """Open the pictures with boxes."""
    pictures, names = list_pictures(root), list_names(root, split, ("Main", "Segmentation"), root / BOXES, ".xml")
    every = [path for path in walk_files(root / BOXES) if path.suffix.lower() == ".xml"]
    read = partial(read_boxes, root=root, pictures=pictures)
    classes = class_names(root, every, read)
    if not os.path.isfile(root / LABELS) and set(classes) <= set(NAMED):
        classes = list(NAMED)
    files = [(name, root / BOXES / f"{name}.xml") for name in names]
    return ShapeSource(files, read, classes, "voc", "instance", ["boxes are taken for masks"])


def list_pictures(root: Path) -> dict[str, Path]:
    """Find each picture by its name without suffix."""
    folder = root / PICTURES
    files = [path for path in walk_files(folder) if path.suffix.lower() in SUFFIXES] if folder.is_dir() else []
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def picture_of(name: str, pictures: dict[str, Path], root: Path) -> Path:
    """Return a picture's file, or where it should be."""
    return pictures.get(name, root / PICTURES / f"{name}.jpg")


def list_names(root: Path, split: str, sets: tuple[str, str], folder: Path, suffix: str) -> list[str]:
    """Read a split's names from the first list there is; without lists divide the files of a folder and suffix."""
    options = [root / "ImageSets" / kind / f"{name}.txt" for kind in sets for name in NAMES[split]]
    path = next((option for option in options if os.path.isfile(option)), None)
    if path:
        names = [line.strip() for line in read_text(path, "a name a line").splitlines()]
        names = list(dict.fromkeys(name for name in names if name))
    elif (root / "ImageSets").is_dir():
        raise UserError(f"no list {options[0]}: write the names of its pictures there, one a line")
    else:
        files = [file for file in walk_files(folder) if file.suffix.lower() == suffix and file.name[0] != "."]
        names = hold_out([file.relative_to(folder).with_suffix("").as_posix() for file in files], split)
    if not names:
        raise UserError(f"no pictures for {split} in {path or folder}: write their names there, one a line")
    return names


def read_xml(path: Path) -> Element:
    """Read a small xml that defines no entities.

    Raises
    ------
    DataError
        Missing, damaged, too large, or with a document type.
    """
    if not os.path.isfile(path):
        raise DataError("missing annotation file", f"no annotation file {path}: put it there, or unlist its picture")
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_XML + 1)
        if len(content) > MOST_XML:
            raise ValueError(f"it has more than {MOST_XML:,} bytes")
        return fromstring(content, forbid_dtd=True)
    except DefusedXmlException as error:
        message = f"{path} defines a document type or entities, which is refused: remove what is in <!DOCTYPE ...>"
        raise DataError("unreadable annotation file", message) from error
    except (ParseError, ValueError, LookupError, OSError, MemoryError, RecursionError) as error:
        message = f"{path} is not readable as xml: {one_line(error)}"
        raise DataError("unreadable annotation file", message) from error


def read_boxes(path: Path, root: Path, pictures: dict[str, Path]) -> Annotation:
    """Read an xml with its picture's size and objects.

    Raises
    ------
    DataError
        Missing, damaged, or an object in it cannot be used.
    """
    tree, place = read_xml(path), "its size"
    name = path.relative_to(root / BOXES).with_suffix("").as_posix()
    try:
        size = tuple(int(number(tree, f"size/{key}")) for key in ("height", "width"))
        shapes = []
        for count, element in enumerate(tree.findall("object"), 1):
            place = f"object {count}"
            label = class_name(element.findtext("name"))
            place += f" ({label})"
            left, top, right, bottom = (number(element, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax"))
            if right < left or bottom < top:
                raise ValueError(f"its box ends before it begins: {left:g}, {top:g} to {right:g}, {bottom:g}")
            box = [left - 1, top - 1, right - left + 1, bottom - top + 1]  # pixels are counted from 1, the last is in
            shapes.append(Shape(label, place, box=box, crowd=is_difficult(element)))
    except ValueError as error:
        message = f"{path}: {place}: {one_line(error)}; correct or remove it"
        raise DataError("broken annotation file", message) from error
    return Annotation(picture_of(name, pictures, root), size, shapes)


def is_difficult(element: Element) -> bool:
    """Return whether an object is marked difficult."""
    found = (element.findtext("difficult") or "0").strip()
    try:
        return flag(found)
    except ValueError as error:
        raise ValueError(f"difficult is {found[:20]!r}: {error}") from error


def number(element: Element, path: str) -> float:
    """Take a number of an element inside another."""
    found = element.findtext(path)
    try:
        value = float(found)
        if abs(value) < 1e9:  # which a NaN is not
            return value
    except (TypeError, ValueError):
        pass
    written = "is missing" if found is None else f"is {found.strip()[:20]!r}, not a number of pixels"
    raise ValueError(f"{path} {written}")


class ObjectSource(MaskSource):
    """Pictures with a mask of class numbers and one of object numbers; parameters as for MaskSource, and the folder."""

    def __init__(self, files, table: CategoryMap, task: str, root: Path):
        super().__init__(files, table, task)
        self.root = root

    def load(self, index: int, epoch: int = 0) -> Sample:
        """Read a picture and its objects, the same in every epoch.

        An object is of the class that most of its pixels have; its other pixels, and void ones, are ignored.
        """
        name, picture, mask = self.files[index]
        outlines = self.root / OBJECTS / f"{name}.png"
        image, classes, objects = read_picture(picture), read_ids(mask), read_ids(outlines)
        for path, ids in ((mask, classes), (outlines, objects)):
            check_size(ids.shape, path, image.shape[:2], picture)
        label_of = self.vocabulary.label_of
        values, counts, _ = distinct(classes)
        pairs = zip(values.tolist(), counts.tolist(), strict=True)
        unknown = {value: count for value, count in pairs if value not in (0, VOID) and value not in label_of}
        if unknown:
            raise unknown_ids(mask, unknown, self.vocabulary, self.table.advice)
        numbers, _, places = distinct(objects)
        parts, ignore = [], (objects == VOID) | (classes == VOID)
        for value in numbers.tolist():
            inside = classes[(objects == value) & ~ignore] if value not in (0, VOID) else classes[:0, 0]
            found = int(np.bincount(inside[inside != 0]).argmax()) if inside.any() else None
            parts.append(None if found is None else (label_of[found], value, False))
            if found is not None:
                ignore |= (objects == value) & (classes != found)
        masks, labels, crowd = split(places, parts)
        return Sample(image, masks & ~ignore, labels, crowd, ignore, name)
