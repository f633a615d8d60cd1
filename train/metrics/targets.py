"""A sample's masks as the maps that evaluators compare."""

import numpy as np

from ..data.sample import Sample

NOTHING = -1  # label of a pixel that has none


def label_map(target: Sample) -> np.ndarray:
    """Return each pixel's label, int64 (H, W); ``NOTHING`` where no mask is, or where pixels are ignored."""
    labels = np.full(target.ignore.shape, NOTHING, dtype=np.int64)
    for mask, label in zip(target.masks, target.labels, strict=True):
        labels[mask] = label
    labels[target.ignore] = NOTHING
    return labels


def segment_map(target: Sample) -> np.ndarray:
    """Return the number of each pixel's mask, int32 (H, W) from 1; 0 where no mask is, or where pixels are ignored."""
    numbers = np.zeros(target.ignore.shape, dtype=np.int32)
    for number, mask in enumerate(target.masks, 1):
        numbers[mask] = number
    numbers[target.ignore] = 0
    return numbers
