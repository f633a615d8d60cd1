"""From class and mask logits to semantic, instance and panoptic results (Cheng et al., Mask2Former, appendix).

One image at a time, in at least float32 whatever the dtype of the logits.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import interpolate

from .checks import check_arrays, check_number, check_sides, check_whole, is_whole, shown


@dataclass(frozen=True)
class Segment:
    """One segment of a panoptic result."""

    id: int  # its number in the map, from 1
    label: int
    score: float
    is_thing: bool


def resize_bilinear(maps, size):
    """Resize maps (q, h, w) to size (H, W): bilinear between pixel centres, edges held."""
    check_arrays(maps=(maps, "real", "q h+ w+"))
    check_sides("size", size)
    if not len(maps):
        return _wide(maps).new_empty(0, *size)
    return interpolate(_wide(maps)[None], size=tuple(size), mode="bilinear", align_corners=False)[0]


def _wide(x):
    """Return x in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def semantic(class_logits, mask_logits):
    """Per-pixel class scores: class logits (q, classes + 1), mask logits (q, H, W) -> (classes, H, W)."""
    check_arrays(class_logits=(class_logits, "real", "q classes+"), mask_logits=(mask_logits, "real", "q h w"))
    inside = _wide(mask_logits).sigmoid()
    prob = _wide(class_logits).softmax(dim=-1)[:, :-1].to(inside.dtype)
    return torch.einsum("qc,qhw->chw", prob, inside)


def instances(class_logits, mask_logits, top=100):
    """The ``top`` best pairs of query and class, as instances.

    Parameters
    ----------
    class_logits : (q, classes + 1) tensor
    mask_logits : (q, H, W) tensor
    top : int

    Returns
    -------
    scores : (r,) tensor
        Class probability times the mean probability of the mask inside itself.
    labels : (r,) int64 tensor
    masks : (r, H, W) bool tensor
    """
    check_arrays(class_logits=(class_logits, "real", "q classes+"), mask_logits=(mask_logits, "real", "q h w"))
    check_whole("top", top, 1)
    prob, mask_logits = _wide(class_logits).softmax(dim=-1)[:, :-1], _wide(mask_logits)
    best = prob.flatten().argsort(descending=True, stable=True)[:top]
    query, labels = best // prob.shape[1], best % prob.shape[1]
    masks = mask_logits[query] > 0
    area = masks.sum(dim=(1, 2), dtype=mask_logits.dtype) + 1e-6
    inside = (mask_logits[query].sigmoid() * masks).sum(dim=(1, 2)) / area
    return prob.flatten()[best] * inside, labels, masks


def panoptic(class_logits, mask_logits, things, object_threshold=0.8, overlap_threshold=0.8):
    """Compute a map that assigns each pixel to at most one segment.

    Parameters
    ----------
    class_logits : (q, classes + 1) tensor
    mask_logits : (q, H, W) tensor
    things : set of int
        Classes that are counted one by one; of each other class there is at most one segment.
    object_threshold : float
        Queries whose best class is less probable are dropped.
    overlap_threshold : float
        A query is dropped if less than this share of its own mask is left to it.

    Returns
    -------
    map : (H, W) int64 tensor
        Segment numbers, 0 where there is none.
    segments : list of Segment
    """
    check_arrays(class_logits=(class_logits, "real", "q classes+"), mask_logits=(mask_logits, "real", "q h w"))
    check_number("object_threshold", object_threshold)
    check_number("overlap_threshold", overlap_threshold)
    if not isinstance(things, set | frozenset | list | tuple | range) or not all(map(is_whole, things)):
        raise TypeError(f"things must be a set of whole numbers, not {shown(things)}")
    object_threshold, overlap_threshold = float(object_threshold), float(overlap_threshold)
    scores, labels = _wide(class_logits).softmax(dim=-1).max(dim=-1)
    kept = ((labels != class_logits.shape[1] - 1) & (scores > object_threshold)).nonzero().flatten()
    result, segments, stuff = torch.zeros_like(mask_logits[0], dtype=torch.int64), [], {}
    if len(kept) == 0:
        return result, segments
    mask_prob = _wide(mask_logits[kept]).sigmoid()
    owner = (scores[kept, None, None] * mask_prob).argmax(dim=0)
    for i, query in enumerate(kept.tolist()):
        whole, owned = mask_prob[i] >= 0.5, owner == i
        mine = owned & whole
        if not mine.any() or owned.sum() / whole.sum() < overlap_threshold:
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
