"""Launcher of the compiled CPU kernels of neighbourhood merging (``cpu.cpp``)."""

import torch

from .. import native

SOURCE = "merging/cpu.cpp"
SUFFIX = {torch.float32: "f32", torch.float64: "f64"}


def forward(features, scores, positions, kept, neighbors, parameters, sign):
    """Merge the neighbourhoods of the kept tokens (paper sec. 3.3.1, Eq. 4).

    Slices of ``kept`` and ``neighbors`` along K give slices of the result, at the same cost: what need not be kept
    whole, as by a network that only predicts, can be taken piece by piece and never leaves the cache.

    Parameters
    ----------
    features : (B, n, C) floating tensor
    scores : (B, n) floating tensor or None
        s; None: 1.
    positions : (B or 1, n, 2) int64 tensor
    kept : (B, K) int64 tensor
        The centres c.
    neighbors : (B, K, M) int64 tensor
        -1 in empty slots.
    parameters : (8, 4) floating tensor
        From ``parameter_matrix``.
    sign : {1, -1}
        1: positions of the neighbours seen from the centre; -1: the other way.

    Returns
    -------
    (B, K, 4 C) tensor
        In the wider of the dtypes of features and scores; computed in float32 or float64.
    """
    out_type = features.dtype if scores is None else torch.promote_types(features.dtype, scores.dtype)
    tensors, sizes = _arguments(features, scores, positions, kept, neighbors, parameters, sign, out_type)
    out = tensors[0].new_empty(*kept.shape, 4 * features.shape[2])
    native.call(SOURCE, f"forward_{SUFFIX[out.dtype]}", *tensors, out, *sizes)
    return out.to(out_type)


def backward(grad_out, features, scores, positions, kept, neighbors, parameters, sign):
    """Gradients of ``forward``: its arguments after ``grad_out`` (B, K, 4 C), the gradient of its result.

    Returns
    -------
    tuple of tensors
        Gradients of features, scores (None without them) and parameters, each in its input's dtype.
    """
    tensors, sizes = _arguments(features, scores, positions, kept, neighbors, parameters, sign, grad_out.dtype)
    wide = tensors[0].dtype
    inputs = features, scores, parameters
    grads = [None if x is None else torch.empty(x.shape, dtype=wide) for x in inputs]
    grad_out = grad_out.to(wide).contiguous()
    native.call(SOURCE, f"backward_{SUFFIX[wide]}", grad_out, *tensors, *grads, *sizes)
    return tuple(None if x is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True))


def _arguments(features, scores, positions, kept, neighbors, parameters, sign, out_type):
    """The kernels' inputs, contiguous and of one floating dtype, and the integers after them."""
    wide = torch.promote_types(out_type, torch.float32)
    floating = [None if x is None else x.to(wide).contiguous() for x in (features, scores, parameters)]
    indices = [x.contiguous() for x in (positions, kept, neighbors)]
    stride = 0 if len(positions) == 1 else 2 * positions.shape[1]
    batch, n, channels = features.shape
    return (*floating[:2], *indices, floating[2]), (sign, stride, batch, n, *neighbors.shape[1:], channels)
