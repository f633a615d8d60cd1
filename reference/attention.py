"""Local attention with relative position and a blank token (paper sec. 3.2, 4.2, 4.3; Eq. 2, 3)."""

import numpy as np

from .checks import check_arrays, check_indices
from .layers import gelu, layer_norm, linear, subset


def local_attention(query, key, value, neighbors, valid, bias, blank_key, blank_value):
    """Compute the attention of each token over its neighbourhood and the blank token.

    Parameters
    ----------
    query, key, value : (n, heads, d) arrays
        The query already scaled by d^-1/2.
    neighbors : (n, M) int64 array
        Token indices of each neighbourhood.
    valid : (n, M) bool array
        False for slots that get no weight.
    bias : (n, M, heads) array
        The position term P of Eq. 2.
    blank_key, blank_value : (heads, d) arrays
        Shared by all tokens; the blank token has no position.

    Returns
    -------
    (n, heads, d) array
        sum_j softmax(logit)_j v_j over the slots and the blank token.
    """
    check_arrays(
        query=(query, "real", "n heads d"), key=(key, "real", "n heads d"), value=(value, "real", "n heads d"),
        neighbors=(neighbors, "whole", "n M"), valid=(valid, "true or false", "n M"), bias=(bias, "real", "n M heads"),
        blank_key=(blank_key, "real", "heads d"), blank_value=(blank_value, "real", "heads d"),
    )  # fmt: skip
    check_indices("neighbors", neighbors, len(query))
    logits = np.einsum("nhd,nmhd->nmh", query, key[neighbors]) + bias  # (n, M, heads)
    logits = np.where(valid[:, :, None], logits, -np.inf)
    blank = np.einsum("nhd,hd->nh", query, blank_key)[:, None]  # (n, 1, heads)
    logits = np.concatenate([logits, blank], axis=1)  # (n, M + 1, heads)
    weight = np.exp(logits - logits.max(axis=1, keepdims=True))
    weight /= weight.sum(axis=1, keepdims=True)
    return np.einsum("nmh,nmhd->nhd", weight[:, :-1], value[neighbors]) + weight[:, -1][:, :, None] * blank_value


def attention(x, geometry, weights, heads):
    """Project tokens to queries, keys and values, attend locally, project back: (n, C) -> (n, C).

    ``key_value`` holds its 2C outputs as [head][key or value][d]; ``position`` maps Eq. 5's five numbers to the heads.
    """
    n, channels = x.shape
    d = channels // heads
    query = linear(x, subset(weights, "query")).reshape(n, heads, d) / np.sqrt(d)
    key_value = linear(x, subset(weights, "key_value")).reshape(n, heads, 2, d)
    out = local_attention(
        query,
        key_value[:, :, 0],
        key_value[:, :, 1],
        geometry.neighbors,
        geometry.valid,
        linear(geometry.relative, subset(weights, "position")),
        weights["blank_key"].reshape(heads, d),
        weights["blank_value"].reshape(heads, d),
    )
    return linear(out.reshape(n, channels), subset(weights, "project"))


def attention_block(x, geometry, weights, heads):
    """One transformer block: x + attention(norm x), then x + MLP(norm x), each scaled where the weights hold a scale.

    Sec. 3.2.

    x (n, C) -> (n, C); ``geometry`` is the stage's ``StageGeometry``.
    """
    update = attention(layer_norm(x, subset(weights, "norm1")), geometry, subset(weights, "attention"), heads)
    x = x + update * weights.get("scale1", 1.0)
    hidden = gelu(linear(layer_norm(x, subset(weights, "norm2")), subset(weights, "mlp.fc1")))
    return x + linear(hidden, subset(weights, "mlp.fc2")) * weights.get("scale2", 1.0)
