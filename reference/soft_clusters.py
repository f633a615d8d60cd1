"""Soft clusters between a stage's tokens and the merged ones (Suzuki, HCFormer, arXiv 2205.09949, on points)."""

import numpy as np

from .checks import check_arrays, check_indices
from .layers import layer_norm, subset
from .neighborhoods import nearest_tokens

CANDIDATES = 9  # merged tokens that a fine token may belong to
SMALL = 1e-8  # keeps the temperature and the norms away from zero


def soft_assignment(fine_positions, fine, coarse_positions, coarse, weights):
    """Compute how much each fine token belongs to each of its nearest merged tokens (ref. 34).

    Parameters
    ----------
    fine_positions, coarse_positions : (n, 2) and (K, 2) int64 arrays
    fine : (n, C) array
        Features before the merge, after the stage's layer norm.
    coarse : (K, C') array
        Features after the merge.
    weights : dict
        ``fine.weight`` (E, C), ``coarse_norm``, ``coarse.weight`` (E, C'), ``temperature`` (1,).

    Returns
    -------
    candidates : (n, 9) int64 array
        Nearest merged tokens (L2, ties in raster order); all of them if there are fewer.
    assignment : (n, 9) array
        softmax over the candidates of cosine similarity / (``|temperature|`` + 1e-8).
    """
    candidates = nearest_tokens(fine_positions, coarse_positions, CANDIDATES)
    a = _unit(fine @ weights["fine.weight"].T)
    b = _unit(layer_norm(coarse, subset(weights, "coarse_norm")) @ weights["coarse.weight"].T)
    cosine = np.einsum("ne,nke->nk", a, b[candidates])
    logits = cosine / (np.abs(weights["temperature"]) + SMALL)
    weight = np.exp(logits - logits.max(axis=1, keepdims=True))
    return candidates, weight / weight.sum(axis=1, keepdims=True)


def _unit(x):
    """Scale the last axis to length 1."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), SMALL)


def decode_clusters(values, candidates, assignment):
    """Lift values of the merged tokens (K, V) to the fine tokens: x_i = sum_j A_ij x_j -> (n, V) (ref. 34)."""
    check_arrays(
        values=(values, "real", "K V"), candidates=(candidates, "whole", "n k"), assignment=(assignment, "real", "n k")
    )
    check_indices("candidates", candidates, values.shape[0])
    return np.einsum("nk,nkv->nv", assignment, values[candidates])
