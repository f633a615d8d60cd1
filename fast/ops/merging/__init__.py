"""Neighbourhood merging (paper sec. 3.3.1, Eq. 4) and PointConv's sum as an operator with several paths.

u_c = vec( sum_j s_j W(p_j - p_c) f_j^T ), from coordinates. ``aff::merge`` and ``aff::merge_backward`` are one opaque
step for torch.compile and CUDA graphs.
"""

import torch
from torch import Tensor

from ...checks import check_arrays
from .. import dispatch
from . import plain


def merge(features, scores, positions, kept, neighbors, parameters, sign=1):
    """Merge the neighbourhoods of the kept tokens.

    Parameters
    ----------
    features : (B, n, C) floating tensor
    scores : (B, n) floating tensor or None
        s; None: 1.
    positions : (B or 1, n, 2) int64 tensor
    kept : (B, K) int64 tensor
        The centres c.
    neighbors : (B, K, M) int64 tensor
        Token indices of their neighbourhoods, -1 in empty slots.
    parameters : (8, 4) floating tensor
        Of ``parameter_matrix``.
    sign : {1, -1}
        1: positions of the neighbours seen from the centre (merging); -1: the other way (PointConv).

    Returns
    -------
    (B, K, 4 C) tensor
        Laid out as [4][C], in the wider of the dtypes of features and scores.
    """
    check_arrays(
        features=(features, "real", "B n C"), positions=(positions, "whole", "images n 2"), kept=(kept, "whole", "B K"),
        neighbors=(neighbors, "whole", "B K M"), parameters=(parameters, "real", "8 4"),
    )  # fmt: skip
    path = dispatch.path("merging", features.device)
    inputs = features, scores, positions, kept, neighbors, parameters, sign
    return plain.merge(*inputs) if path == "plain" else _merge(*inputs, path)


def parameter_matrix(weight_net):
    """Write the network W of Eq. 4 as one (8, 4) matrix: columns of its weight, bias, the norm's weight and bias."""
    linear, norm = weight_net[0], weight_net[1]
    return torch.cat([linear.weight.T, linear.bias[None], norm.weight[None], norm.bias[None]])


@torch.library.custom_op("aff::merge", mutates_args=())
def _merge(
    features: Tensor,
    scores: Tensor | None,
    positions: Tensor,
    kept: Tensor,
    neighbors: Tensor,
    parameters: Tensor,
    sign: int,
    path: str,
) -> Tensor:
    """``merge`` by the kernel of a path."""
    inputs = features, scores, positions, kept, neighbors, parameters, sign
    return dispatch.run("merging", path, _kernel(path).forward, *inputs)


@_merge.register_fake
def _(features, scores, positions, kept, neighbors, parameters, sign, path):
    dtype = features.dtype if scores is None else torch.promote_types(features.dtype, scores.dtype)
    return features.new_empty(*kept.shape, plain.MID_CHANNELS * features.shape[2], dtype=dtype)


@torch.library.custom_op("aff::merge_backward", mutates_args=())
def _merge_backward(
    grad_out: Tensor,
    features: Tensor,
    scores: Tensor | None,
    positions: Tensor,
    kept: Tensor,
    neighbors: Tensor,
    parameters: Tensor,
    sign: int,
    path: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of features, scores (empty without scores) and parameters from that of the result."""
    inputs = grad_out, features, scores, positions, kept, neighbors, parameters, sign
    grad_features, grad_scores, grad_parameters = dispatch.run("merging", path, _kernel(path).backward, *inputs)
    return grad_features, features.new_empty(0) if scores is None else grad_scores, grad_parameters


@_merge_backward.register_fake
def _(grad_out, features, scores, positions, kept, neighbors, parameters, sign, path):
    grad_scores = features.new_empty(0) if scores is None else scores.new_empty(scores.shape)
    return features.new_empty(features.shape), grad_scores, parameters.new_empty(parameters.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.sign, ctx.path = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad_out):
    features, scores, *rest = ctx.saved_tensors
    grads = torch.ops.aff.merge_backward(grad_out, features, scores, *rest, ctx.sign, ctx.path)
    return grads[0], None if scores is None else grads[1], None, None, None, grads[2], None, None


_merge.register_autograd(_differentiate, setup_context=_save)


def _kernel(path):
    """The module of a path's kernels."""
    if path == "triton":
        from . import triton

        return triton
    from . import cpu

    return cpu


@dispatch.trial("merging")
def _trial(path, device):
    """Result and gradients for 12 tokens of 16 channels, three of them kept, with empty slots."""
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 12, 16), (1, 12), (8, 4)
    inputs = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
    number = torch.arange(12, device=device)
    positions, kept = torch.stack([number % 4, number // 4], dim=-1)[None], number[None, ::4]
    neighbors = torch.stack([number[:3], number[3:6], number[:3] - 1], dim=-1)[None]
    features, scores, parameters = inputs
    with dispatch.force(merging=path):
        out = merge(features, scores, positions, kept, neighbors, parameters)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]
