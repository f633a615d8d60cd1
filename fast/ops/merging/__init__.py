"""``aff::merge`` and its backward as operators of torch.library: one opaque step for torch.compile and CUDA graphs.

They compute the sum of Eq. 4 from coordinates: u_c = vec( sum_j s_j W(p_j - p_c) f_j^T ). Which path runs is looked up
when an operator is called (``dispatch``), so forward and backward can fall back alone. The plain backward is written by
hand, because an operator's inside is hidden from autograd.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ...position import relative_position
from .. import dispatch
from ..csr import scatter_rows, transpose
from ..indexing import gather_rows

EPSILON = 1e-5  # of the layer norm


@torch.library.custom_op("aff::merge", mutates_args=())
def merge(
    features: Tensor,
    scores: Tensor | None,
    positions: Tensor,
    kept: Tensor,
    neighbors: Tensor,
    parameters: Tensor,
    sign: int = 1,
) -> Tensor:
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
        From ``parameter_matrix``.
    sign : {1, -1}
        1: positions of the neighbours seen from the centre (merging); -1: the other way (PointConv).

    Returns
    -------
    (B, K, 4 C) tensor
        Laid out as [4][C], in the wider of the dtypes of features and scores.
    """
    inputs = features, scores, positions, kept, neighbors, parameters, sign
    return dispatch.run(
        "merging", features.device, {"triton": lambda: _fused().forward(*inputs), "gather": lambda: _plain(*inputs)}
    )


@merge.register_fake
def _(features, scores, positions, kept, neighbors, parameters, sign=1):
    return features.new_empty(*kept.shape, 4 * features.shape[2], dtype=_out_type(features, scores))


@torch.library.custom_op("aff::merge_backward", mutates_args=())
def merge_backward(
    grad: Tensor,
    features: Tensor,
    scores: Tensor | None,
    positions: Tensor,
    kept: Tensor,
    neighbors: Tensor,
    parameters: Tensor,
    sign: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of features, scores (empty without scores) and parameters from that of the result."""
    inputs = grad, features, scores, positions, kept, neighbors, parameters, sign
    grad_features, grad_scores, grad_parameters = dispatch.run(
        "merging",
        features.device,
        {"triton": lambda: _fused().backward(*inputs), "gather": lambda: _plain_backward(*inputs)},
    )
    return grad_features, features.new_empty(0) if scores is None else grad_scores, grad_parameters


@merge_backward.register_fake
def _(grad, features, scores, positions, kept, neighbors, parameters, sign):
    grad_scores = features.new_empty(0) if scores is None else scores.new_empty(scores.shape)
    return features.new_empty(features.shape), grad_scores, parameters.new_empty(parameters.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.sign = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad):
    features, scores, *rest = ctx.saved_tensors
    grads = torch.ops.aff.merge_backward(grad, features, scores, *rest, ctx.sign)
    return grads[0], None if scores is None else grads[1], None, None, None, grads[2], None


merge.register_autograd(_differentiate, setup_context=_save)


def parameter_matrix(weight_net):
    """Write the network W of Eq. 4 as one (8, 4) matrix: columns of its weight, bias, the norm's weight and bias."""
    linear, norm = weight_net[0], weight_net[1]
    return torch.cat([linear.weight.T, linear.bias[None], norm.weight[None], norm.bias[None]])


def _fused():
    from . import triton

    return triton


def _out_type(features, scores):
    return features.dtype if scores is None else torch.promote_types(features.dtype, scores.dtype)


def _network(positions, kept, neighbors, parameters, sign, wide):
    """Slot weights (B, K, M, 4), 0 in empty slots, and what they are made of."""
    positions = positions.expand(len(kept), -1, -1)
    near, matrix = gather_rows(positions, neighbors.clamp(min=0)), parameters.to(wide)
    relative = relative_position(sign * (near - gather_rows(positions, kept)[:, :, None]), wide)
    hidden = relative @ matrix[:5] + matrix[5]
    normal, mean, inverse = torch.native_layer_norm(hidden, (4,), None, None, EPSILON)
    inner = normal * matrix[6] + matrix[7]
    weights = functional.gelu(inner) * (neighbors >= 0)[..., None]
    return weights, inner, normal, (hidden, (4,), mean, inverse), relative


def _gathered(features, scores, neighbors, wide):
    """Features (B, K, M, C) and scores (B, K, M, 1 or less) of the slots."""
    near = neighbors.clamp(min=0)
    score = features.new_ones((), dtype=wide) if scores is None else gather_rows(scores, near)[..., None].to(wide)
    return gather_rows(features, near).to(wide), score


def _plain(features, scores, positions, kept, neighbors, parameters, sign):
    out_type = _out_type(features, scores)
    wide = torch.promote_types(out_type, torch.float32)
    weights = _network(positions, kept, neighbors, parameters, sign, wide)[0]
    near, score = _gathered(features, scores, neighbors, wide)
    return ((weights * score).transpose(2, 3) @ near).flatten(2).to(out_type)


def _plain_backward(grad, features, scores, positions, kept, neighbors, parameters, sign):
    wide = torch.promote_types(grad.dtype, torch.float32)
    weights, inner, normal, norm, relative = _network(positions, kept, neighbors, parameters, sign, wide)
    near, score = _gathered(features, scores, neighbors, wide)
    grad = grad.unflatten(2, (4, -1)).to(wide)
    products = near @ grad.transpose(2, 3) * (neighbors >= 0)[..., None]  # (B, K, M, 4)
    grad_inner = torch.ops.aten.gelu_backward(products * score, inner)
    grad_normal = grad_inner * parameters[6].to(wide)
    grad_hidden = torch.ops.aten.native_layer_norm_backward(grad_normal, *norm, None, None, [True, False, False])[0]
    sums = [relative.flatten(0, 2).T @ grad_hidden.flatten(0, 2)]
    sums += [x.sum(dim=(0, 1, 2))[None] for x in (grad_hidden, grad_inner * normal, grad_inner)]
    lists = transpose(neighbors, features.shape[1])
    grad_features = scatter_rows((weights * score @ grad).flatten(1, 2), *lists).to(features.dtype)
    if scores is not None:
        scores = scatter_rows((products * weights).sum(dim=3).flatten(1, 2)[..., None], *lists)[..., 0].to(scores.dtype)
    return grad_features, scores, torch.cat(sums).to(parameters.dtype)
