"""Masks as COCO's run lengths and boxes."""

import warnings

import numpy as np
from pycocotools import mask as coco_mask


def encode(mask: np.ndarray) -> dict:
    """Write a mask (H, W) bool as COCO's run lengths, ``counts`` as text."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode(rle: dict) -> np.ndarray:
    """Read COCO's run lengths, ``counts`` as text or bytes, as a mask (H, W) bool."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools 2.0.11 with NumPy 2: __array__ without copy
        return coco_mask.decode(rle).astype(bool)


def area(rle: dict) -> int:
    """Count the pixels of a mask in run lengths."""
    return int(coco_mask.area(rle))


def intersection(first: dict, second: dict) -> dict:
    """Return the pixels that are in both masks, in run lengths."""
    rle = coco_mask.merge([first, second], intersect=True)
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def box(mask: np.ndarray) -> list[int]:
    """Return a mask's bounding box [x, y, width, height]."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0]) + 1, int(rows[-1] - rows[0]) + 1]
