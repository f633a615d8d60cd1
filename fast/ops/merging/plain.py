"""Neighbourhood merging (paper sec. 3.3.1, Eq. 4): eager PyTorch with autograd, the definition of this side."""

import torch
from torch.nn import functional

from ...position import relative_position
from ..indexing import autocast_device, gather_rows, recomputed, token_slices

MID_CHANNELS = 4  # weights a slot
EPSILON = 1e-5  # of the layer norm


def slot_weights(relative, valid, parameters):
    """Compute W of Eq. 4: four weights for every slot of a neighbourhood, from its relative position alone.

    Parameters
    ----------
    relative : (B, K, M, 5) tensor
    valid : (B, K, M) bool tensor
    parameters : (8, 4) tensor
        Of ``ops.parameter_matrix``.

    Returns
    -------
    (B, K, M, 4) tensor
        0 in empty slots.
    """
    hidden = relative @ parameters[:5] + parameters[5]
    normalized = functional.layer_norm(hidden, (MID_CHANNELS,), parameters[6], parameters[7], EPSILON)
    return functional.gelu(normalized).masked_fill(~valid[..., None], 0)


def merge_neighborhoods(features, scores, neighbors, slots):
    """Sum the neighbourhood of every kept token: vec( sum_j s_j W_j f_j^T ).

    Parameters
    ----------
    features : (B, n, C) tensor
    scores : (B, n) tensor or None
        s; every token of a neighbourhood gets gradient through it. None: 1.
    neighbors : (B, K, M) int64 tensor
    slots : (B, K, M, 4) tensor
        W, 0 in empty slots.

    Returns
    -------
    (B, K, 4 C) tensor
        Laid out as [4][C].
    """
    weighted = features if scores is None else features * scores[..., None]
    slots = slots.to(weighted.dtype).transpose(2, 3)  # (B, K, 4, M)
    parts = token_slices(neighbors, features.shape[0] * features.shape[2])
    sums = [recomputed(_sum_slots, weighted, neighbors[:, part], slots[:, part]) for part in parts]
    return torch.cat(sums, dim=1)


def _sum_slots(weighted, neighbors, slots):
    """weighted (B, n, C), neighbors (B, K, M), slots (B, K, 4, M) -> (B, K, 4 C)."""
    return (slots @ gather_rows(weighted, neighbors)).flatten(2)


def merge(features, scores, positions, kept, neighbors, parameters, sign):
    """``ops.merge`` by ``slot_weights`` and ``merge_neighborhoods``: same arguments, same result."""
    valid, near, positions = neighbors >= 0, neighbors.clamp(min=0), positions.expand(kept.shape[0], -1, -1)
    offsets = sign * (gather_rows(positions, near) - gather_rows(positions, kept)[:, :, None])
    with torch.autocast(autocast_device(features), enabled=False):  # position needs the digits
        slots = slot_weights(relative_position(offsets, parameters.dtype), valid, parameters)
    return merge_neighborhoods(features, scores, near, slots)
