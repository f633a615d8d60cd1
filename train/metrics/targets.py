"""A sample's masks as the maps that judges compare."""

import numpy as np

from ..data.sample import Sample

NOTHING = -1  # label of a pixel that has none


def label_map(truth: Sample) -> np.ndarray:
    """Give each pixel its label, int64 (H, W); ``NOTHING`` where no mask is, or where no judge looks."""
    labels = np.full(truth.ignore.shape, NOTHING, dtype=np.int64)
    for mask, label in zip(truth.masks, truth.labels, strict=True):
        labels[mask] = label
    labels[truth.ignore] = NOTHING
    return labels


def segment_map(truth: Sample) -> np.ndarray:
    """Give each pixel the number of its mask, int32 (H, W) from 1; 0 where no mask is, or where no judge looks."""
    numbers = np.zeros(truth.ignore.shape, dtype=np.int32)
    for number, mask in enumerate(truth.masks, 1):
        numbers[mask] = number
    numbers[truth.ignore] = 0
    return numbers
