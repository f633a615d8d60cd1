"""COCO's outlines and run lengths made into masks, after seeing that they are whole.

pycocotools trusts what it is given: a coordinate that is not finite takes all memory, and run lengths that do not add
up to the picture leave pixels undefined. So both are checked first.
"""

import math

import numpy as np
from pycocotools import mask as coco

from .coco_json import shown

LONGEST = 40  # bits of a packed run


def to_mask(segmentation, height: int, width: int) -> np.ndarray:
    """Draw one annotation.

    Parameters
    ----------
    segmentation : list of list of float, or dict
        Polygons x0, y0, x1, y1, ..., or run lengths ``{"size": [h, w], "counts": list, str or bytes}``.
    height, width : int
        Of the picture, pixels.

    Returns
    -------
    ndarray of bool, shape (height, width)

    Raises
    ------
    ValueError
        It is broken; the message says how.
    """
    if isinstance(segmentation, dict):
        return decode(segmentation, height, width)
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError("its segmentation holds no polygon")
    for polygon in segmentation:
        check_polygon(polygon, height, width)
    return decode(coco.merge(coco.frPyObjects(segmentation, height, width)), height, width)


def box_to_mask(box, height: int, width: int) -> np.ndarray:
    """Draw a box [x, y, width, height], which may reach out of the picture: the pixels whose centres are in it.

    Raises
    ------
    ValueError
        It is no box, or one far outside the picture.
    """
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(value, int | float) for value in box):
        raise ValueError("its box is no list of x, y, width and height")
    mask = np.zeros((height, width), dtype=bool)
    spans = []
    for start, length, side in ((box[1], box[3], height), (box[0], box[2], width)):
        if not (-side <= start <= 2 * side and 0 <= length <= 3 * side):
            raise ValueError(f"its box of {str(length)[:20]} from {str(start)[:20]} is far outside the picture")
        spans.append(slice(max(0, math.ceil(start - 0.5)), max(0, math.ceil(start + length - 0.5))))
    mask[tuple(spans)] = True
    return mask


def check_polygon(polygon, height: int, width: int) -> None:
    """Refuse a polygon without three points, with half a point, or with one far outside the picture."""
    if not isinstance(polygon, list) or not all(isinstance(value, int | float) for value in polygon):
        raise ValueError("its polygon is no list of numbers")
    if len(polygon) < 6 or len(polygon) % 2:
        raise ValueError(f"its polygon has {len(polygon)} numbers, not x and y of three points or more")
    for place, value in enumerate(polygon):
        side = (width, height)[place % 2]
        if not -side <= value <= 2 * side:  # which a NaN is not, either
            at = str(value)[:20]
            raise ValueError(f"its polygon has a point at {at}, far outside the picture of {width} x {height}")


def decode(segmentation: dict, height: int, width: int) -> np.ndarray:
    """Draw run lengths, which go down the columns and start with a run of False."""
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if size != [height, width]:
        raise ValueError(f"its run lengths are for height and width {shown(size)}, the picture's are {[height, width]}")
    if isinstance(counts, str | bytes):
        counts = unpack(counts.encode() if isinstance(counts, str) else counts)
    if not isinstance(counts, list) or not all(isinstance(run, int) and run >= 0 for run in counts):
        raise ValueError("its run lengths are no list of whole numbers")
    if sum(counts) != height * width:
        raise ValueError(f"its run lengths add up to {sum(counts)} pixels, not {height * width}")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def unpack(text: bytes) -> list[int]:
    """Undo COCO's packing: five bits a character, the sixth for "goes on"; from the fourth run on, differences."""
    runs, value, shift = [], 0, 0
    for character in text:
        bits = character - 48
        if not 0 <= bits < 64 or shift > LONGEST:
            raise ValueError("its run lengths are no text that COCO packs")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs
