"""What is predicted for one image, at the size of the original image.

=========  =====================================================================================
task       prediction
=========  =====================================================================================
semantic   labels, ndarray of int64 (H, W)
instance   list of ``Instance``: masks as run lengths, so that a data set's results fit in memory
panoptic   ``Panoptic``: a map of segment ids and the list of segments
=========  =====================================================================================
"""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Instance:
    """One object: its label, how sure the model is, its mask in COCO's run lengths (``size`` [H, W] and ``counts``)."""

    label: int
    score: float
    rle: dict


class Segment(Protocol):
    """What is asked of a panoptic segment; ``fast.postprocess.Segment`` has it."""

    id: int
    label: int
    score: float
    is_thing: bool


@dataclass(frozen=True)
class Panoptic:
    """A panoptic result.

    Attributes
    ----------
    map : ndarray of int32, shape (H, W)
        Segment ids, 0 where there is no segment.
    segments : list of Segment
        Every segment of the map, and no other.
    """

    map: np.ndarray
    segments: list[Segment]


def image_id(name: str) -> int | str:
    """Return an image's id in results: a number if its name is one, else without folders and ``_leftImg8bit``."""
    plain = name.rsplit("/", 1)[-1].removesuffix("_leftImg8bit")
    return int(plain) if plain.isdecimal() else plain


def by_id(name: str) -> tuple:
    """Order images as COCO's evaluator does: numbers by value, before other names."""
    identity = image_id(name)
    return (0, identity, name) if isinstance(identity, int) else (1, identity, name)


def check(task: str, prediction, name: str, size: tuple[int, int], classes: int) -> None:
    """Refuse a prediction that no evaluator could read.

    Parameters
    ----------
    task : str
        "semantic", "instance" or "panoptic".
    prediction : ndarray, list of Instance, or Panoptic
    name : str
        Of the image.
    size : tuple of int
        (H, W) of the original image.
    classes : int

    Raises
    ------
    ValueError
        A wrong size, a label outside 0 to classes - 1, a score that is no number, or segments that are not those of the
        map.
    """
    {"semantic": _check_semantic, "instance": _check_instances, "panoptic": _check_panoptic}[task](
        prediction, name, tuple(size), classes
    )


def _check_semantic(labels, name, size, classes) -> None:
    _check_size(labels.shape, name, size)
    if labels.size:
        _check_label(labels.min(), name, classes)
        _check_label(labels.max(), name, classes)


def _check_instances(instances, name, size, classes) -> None:
    for each in instances:
        _check_size(each.rle["size"], name, size)
        _check_label(each.label, name, classes)
        if not math.isfinite(each.score):
            raise ValueError(f"image {name}: an instance's score is {each.score}; scores must be finite numbers")


def _check_panoptic(prediction, name, size, classes) -> None:
    _check_size(prediction.map.shape, name, size)
    ids = [segment.id for segment in prediction.segments]
    present = set(np.unique(prediction.map).tolist()) - {0}
    if len(set(ids)) != len(ids) or set(ids) != present:
        odd = sorted(present.symmetric_difference(ids)) or "one id twice"
        raise ValueError(f"image {name}: map and list of segments differ in {odd}; list each segment of the map once")
    for segment in prediction.segments:
        _check_label(segment.label, name, classes)


def _check_size(shape, name, size) -> None:
    if tuple(shape) != size:
        raise ValueError(
            f"image {name}: a prediction of {' x '.join(map(str, shape))} pixels for an image of {size[0]} x {size[1]} "
            "(height x width): resize predictions to the original image"
        )


def _check_label(label, name, classes) -> None:
    if not 0 <= label < classes:
        raise ValueError(f"image {name}: predicted label {label} is outside 0 to {classes - 1}")
