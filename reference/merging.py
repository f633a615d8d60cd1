"""Neighbourhood merging (paper sec. 3.3.1, Eq. 4): a PointConv whose inputs are weighted by their importance."""

import numpy as np

from .layers import gelu, layer_norm, linear, subset


def slot_weights(relative, valid, weights):
    """W of Eq. 4: four weights for every slot of a neighbourhood, from its relative position alone.

    Parameters
    ----------
    relative : (K, M, 5) array
        Relative position of the neighbours seen from the kept token.
    valid : (K, M) bool array
    weights : dict
        ``0``: linear 5 -> 4, ``1``: layer norm over the four.

    Returns
    -------
    (K, M, 4) array
        0 in empty slots.
    """
    w = gelu(layer_norm(linear(relative, subset(weights, "0")), subset(weights, "1")))
    return np.where(valid[:, :, None], w, 0.0)


def merge_neighborhoods(features, scores, neighbors, slots):
    """Sum the neighbourhood of every kept token: vec( sum_j s_j W_j f_j^T ) (Eq. 4).

    Parameters
    ----------
    features : (n, C) array
    scores : (n,) array
        s; a token of importance 0 leaves no trace.
    neighbors : (K, M) int64 array
        Token indices of the kept tokens' neighbourhoods.
    slots : (K, M, 4) array
        From ``slot_weights``.

    Returns
    -------
    (K, 4 C) array
        Laid out as [4][C].
    """
    weighted = scores[:, None] * features
    return np.einsum("kmw,kmc->kwc", slots, weighted[neighbors]).reshape(len(neighbors), -1)


def merging(features, scores, kept, geometry, weights):
    """Merge the neighbourhoods of the kept tokens and map them to the next stage's channels (Eq. 4).

    features (n, C), scores (n,), kept (K,) -> (K, C'). The positions of the merged tokens are those of the kept ones.
    """
    slots = slot_weights(geometry.relative[kept], geometry.valid[kept], subset(weights, "weight_net"))
    merged = merge_neighborhoods(features, scores, geometry.neighbors[kept], slots)
    return linear(layer_norm(merged, subset(weights, "norm")), subset(weights, "linear"))
