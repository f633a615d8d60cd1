"""The textbook layers that every network shares: linear, norms, GELU, softmax, convolution, plain attention.

``fast`` takes these from ``torch.nn``; here they are written out, so that nothing is left to a library's default.
``weights`` is always a flat dict of arrays; ``subset`` picks the part that belongs to one layer.
"""

import numpy as np
from scipy.special import erf

from .checks import shown

EPSILON = 1e-5  # of every layer norm and of the batch norm


class Weights(dict):
    """Arrays by name; asking for one that is not there is a ValueError that names it."""

    def __missing__(self, name):
        raise ValueError(f"weights lack {shown(name)}; there are {shown(list(self))}")


def as_weights(weights):
    """Return a dict of names to arrays as Weights in float64.

    Raises
    ------
    TypeError
        Not a dict of strings to arrays of numbers.
    """
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise TypeError(f"weights must be a dict of names to arrays, not {shown(type(weights).__name__)}")
    found = Weights()
    for name, value in weights.items():
        try:
            found[name] = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError):
            raise TypeError(f"weights must hold arrays of numbers; {name} is {shown(value)}") from None
    return found


def subset(weights, prefix):
    """Return the entries of ``weights`` whose names start with ``prefix.``, with that start removed."""
    start = prefix + "."
    return Weights({name[len(start) :]: value for name, value in weights.items() if name.startswith(start)})


def linear(x, weights):
    """Return ``x @ weight.T + bias``: x (..., C_in), weight (C_out, C_in), bias (C_out,) -> (..., C_out)."""
    return x @ weights["weight"].T + weights["bias"]


def layer_norm(x, weights):
    """Normalise the last axis to mean 0 and variance 1, then scale and shift: (..., C) -> (..., C)."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + EPSILON) * weights["weight"] + weights["bias"]


def batch_norm(x, weights):
    """Normalise each channel of x (C, h, w) by its running mean and variance, as in evaluation."""
    column = {name: value[:, None, None] for name, value in weights.items() if np.ndim(value) == 1}
    scaled = (x - column["running_mean"]) / np.sqrt(column["running_var"] + EPSILON)
    return scaled * column["weight"] + column["bias"]


def gelu(x):
    """Return x times the Gaussian distribution function of x (the exact GELU, not the tanh form)."""
    return x * 0.5 * (1.0 + erf(x / np.sqrt(2.0)))


def sigmoid(x):
    """Return 1 / (1 + exp(-x)) without overflow for large negative x."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def convolution_3x3_stride_2(x, weights):
    """Convolve x (C_in, h, w) with weight (C_out, C_in, 3, 3), zero padding 1, stride 2 -> (C_out, h', w')."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::2, ::2]  # (C_in, h', w', 3, 3)
    return np.einsum("ihwyx,oiyx->ohw", windows, weights["weight"], optimize=True) + weights["bias"][:, None, None]


def relu(x):
    """Return x where it is positive, else 0."""
    return np.maximum(x, 0.0)


def log_softmax(logits):
    """Return log softmax over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def softplus(x):
    """Return log(1 + exp(x)) without overflow."""
    return np.logaddexp(0.0, x)


def multihead_attention(query, key, value, weights, heads, attn_mask=None):
    """Plain attention: query (q, D), key and value (n, D), attn_mask (q, n) bool or None -> (q, D).

    ``in_proj_weight`` and ``in_proj_bias`` hold query, key and value projections, one below the other.
    """
    w, b = np.split(weights["in_proj_weight"], 3), np.split(weights["in_proj_bias"], 3)
    q, k, v = ((x @ wi.T + bi).reshape(len(x), heads, -1) for x, wi, bi in zip((query, key, value), w, b, strict=True))
    logits = np.einsum("qhd,nhd->hqn", q, k) / np.sqrt(q.shape[-1])
    if attn_mask is not None:
        logits = np.where(attn_mask, -np.inf, logits)
    weight = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weight /= weight.sum(axis=-1, keepdims=True)
    return linear(np.einsum("hqn,nhd->qhd", weight, v).reshape(len(query), -1), subset(weights, "out_proj"))
