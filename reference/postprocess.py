"""From class and mask logits to semantic, instance and panoptic results (Cheng et al., Mask2Former, appendix)."""

from dataclasses import dataclass

import numpy as np

from .checks import check_arrays, check_number, check_sides, check_whole, is_whole, shown
from .layers import log_softmax, sigmoid


@dataclass(frozen=True)
class Segment:
    """One segment of a panoptic result (Mask2Former, appendix)."""

    id: int  # its number in the map, from 1
    label: int
    score: float
    is_thing: bool


def resize_bilinear(maps, size):
    """Resize maps (q, h, w) to size (H, W): bilinear between pixel centres, edges held (Mask2Former, appendix)."""
    check_arrays(maps=(maps, "real", "q h+ w+"))
    check_sides("size", size)
    for axis, length in zip((1, 2), size, strict=True):
        have = maps.shape[axis]
        at = np.clip((np.arange(length) + 0.5) * have / length - 0.5, 0, have - 1)
        low = np.floor(at).astype(int)
        share = (at - low).reshape([-1 if a == axis else 1 for a in range(3)])
        high = np.minimum(low + 1, have - 1)
        maps = maps.take(low, axis) * (1 - share) + maps.take(high, axis) * share
    return maps


def semantic(class_logits, mask_logits):
    """Per-pixel class scores: class logits (q, classes + 1), mask logits (q, H, W) -> (classes, H, W).

    Mask2Former, appendix.

    Each query votes for its classes where its mask is; the arg max over the first axis is the label map.
    """
    check_arrays(class_logits=(class_logits, "real", "q classes+"), mask_logits=(mask_logits, "real", "q h w"))
    prob = np.exp(log_softmax(class_logits))[:, :-1]
    return np.einsum("qc,qhw->chw", prob, sigmoid(mask_logits))


def instances(class_logits, mask_logits, top=100):
    """The ``top`` best pairs of query and class, as instances (Mask2Former, appendix).

    Parameters
    ----------
    class_logits : (q, classes + 1) array
    mask_logits : (q, H, W) array
    top : int

    Returns
    -------
    scores : (r,) array
        Class probability times the mean probability of the mask inside itself; of the pairs with the highest class
        probability, equal ones in the order of the query, then of the class.
    labels : (r,) int array
    masks : (r, H, W) bool array
    """
    check_arrays(class_logits=(class_logits, "real", "q classes+"), mask_logits=(mask_logits, "real", "q h w"))
    check_whole("top", top, 1)
    prob = np.exp(log_softmax(class_logits))[:, :-1]
    best = np.argsort(-prob.ravel(), kind="stable")[:top]
    query, labels = np.divmod(best, prob.shape[1])
    masks = mask_logits[query] > 0
    inside = (sigmoid(mask_logits[query]) * masks).sum(axis=(1, 2)) / (masks.sum(axis=(1, 2)) + 1e-6)
    return prob.ravel()[best] * inside, labels, masks


def panoptic(class_logits, mask_logits, things, object_threshold=0.8, overlap_threshold=0.8):
    """Compute a map that assigns each pixel to at most one segment (Mask2Former, appendix).

    Parameters
    ----------
    class_logits : (q, classes + 1) array
    mask_logits : (q, H, W) array
    things : set of int
        Classes that are counted one by one; of each other class there is at most one segment.
    object_threshold : float
        Queries whose best class is less probable are dropped.
    overlap_threshold : float
        A query is dropped if less than this share of its own mask is left to it.

    Returns
    -------
    map : (H, W) int64 array
        Segment numbers, 0 where there is none.
    segments : list of Segment
    """
    check_arrays(class_logits=(class_logits, "real", "q classes+"), mask_logits=(mask_logits, "real", "q h w"))
    check_number("object_threshold", object_threshold)
    check_number("overlap_threshold", overlap_threshold)
    if not isinstance(things, set | frozenset | list | tuple | range) or not all(map(is_whole, things)):
        raise TypeError(f"things must be a set of whole numbers, not {shown(things)}")
    prob = np.exp(log_softmax(class_logits))
    labels, scores = prob.argmax(axis=1), prob.max(axis=1)
    kept = np.flatnonzero((labels != prob.shape[1] - 1) & (scores > object_threshold))
    result, segments, stuff = np.zeros(mask_logits.shape[1:], dtype=np.int64), [], {}
    if len(kept) == 0:
        return result, segments
    mask_prob = sigmoid(mask_logits[kept])
    owner = (scores[kept, None, None] * mask_prob).argmax(axis=0)
    for i, query in enumerate(kept):
        whole, mine = mask_prob[i] >= 0.5, (owner == i) & (mask_prob[i] >= 0.5)
        if not mine.any() or (owner == i).sum() / whole.sum() < overlap_threshold:
            continue
        label = int(labels[query])
        if label in stuff:
            result[mine] = stuff[label]
            continue
        segments.append(Segment(len(segments) + 1, label, float(scores[query]), label in things))
        result[mine] = len(segments)
        if label not in things:
            stuff[label] = len(segments)
    return result, segments
