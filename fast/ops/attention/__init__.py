"""Neighbourhood attention (paper sec. 3.2, 4.2, 4.3; Eq. 2, 3, 5) as an operator with several paths.

``aff::attention`` and ``aff::attention_backward`` are one opaque step for torch.compile and CUDA graphs. Which kernel
they run is said by the plan: what that kernel wants to know of a stage's geometry, made once a stage.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ...position import relative_position
from .. import dispatch
from . import clusters, clusters_plan, cpu, plain, triton_plan


class Plan(NamedTuple):
    """What a path of attention wants to know of a stage's geometry."""

    path: str
    tensors: tuple  # of Tensor; of the Plan of ``cpu``, ``clusters_plan`` or ``triton_plan``; none for "plain"


def neighborhood_attention(query, kv, blank, weight, bias, geometry):
    """Compute the attention of every token over its neighbourhood, with relative position, and the blank token.

    logit_ij = q_i . k_j + weight . e_ij + bias, e_ij the five numbers of Eq. 5 of p_j - p_i; the blank token's is
    q_i . k_blank; out_i = sum_j p_ij v_j + p_blank v_blank, p the softmax of the logits. Forward and backward with
    float32 or wider sums on every path but "plain", which sums in the inputs' dtype.

    Parameters
    ----------
    query : (B, k m, H, d) tensor
        Already scaled by d^-1/2; tokens as ``StageGeometry.to_clusters`` puts them.
    kv : (B, k m, H, 2, d) tensor
        Keys and values.
    blank : (H, 2, d) tensor
        Key and value of the blank token.
    weight, bias : (H, 5) and (H,) tensors
        The position term's.
    geometry : StageGeometry
        With ``in_clusters``.

    Returns
    -------
    (B, k m, H, d) tensor
        What stands in empty places of short clusters has no meaning.
    """
    if geometry.plan.path == "plain":
        return plain.attention(query, kv, blank, weight, bias, geometry)
    path, tensors = geometry.plan
    return attention(query, kv, blank, weight, bias, geometry.members, path, list(tensors))[0]


def make_plan(path, positions, members, nearest, dtype=torch.float32):
    """Compute the tensors of a path's plan.

    Parameters
    ----------
    path : str
    positions : (B, n, 2) int64 tensor
    members : (B, k, m) int64 tensor
        Token indices of each cluster, -1 in empty places.
    nearest : (B, n, R) int64 tensor
        Clusters that each token sees.
    dtype : torch.dtype
        Of relative positions.

    Returns
    -------
    list of tensors
    """
    if path == "triton":
        return list(triton_plan.make_plan(positions, members, nearest)[:-1])
    if path == "cpu":
        return list(cpu.make_plan(positions, members, nearest))
    if path == "clusters":
        return clusters_plan.make_plan(positions, members, nearest, dtype)
    return []


def fake_plan(path, positions, members, nearest, dtype):
    """Tensors like those of ``make_plan``, without values, for torch.compile."""
    if path == "cpu":
        return list(cpu.fake_plan(positions, members, nearest))
    if path == "clusters":
        return clusters_plan.fake_plan(positions, members, dtype)
    return make_plan(path, positions, members, nearest, dtype)


@torch.library.custom_op("aff::attention", mutates_args=())
def attention(
    query: Tensor,
    kv: Tensor,
    blank: Tensor,
    weight: Tensor,
    bias: Tensor,
    members: Tensor,
    path: str,
    plan: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """Attend, as ``neighborhood_attention`` says; ``members`` of the geometry, path and tensors of its plan.

    Returns out (B, k m, H, d) and the log-sum-exp of the logits (B, k m, H), in float32 or wider.
    """
    inputs = (query, kv, blank, weight, bias)
    if query.shape[0] == 0:
        return _empty_output(*inputs)
    return dispatch.run("attention", path, _FORWARD[path], *inputs, members, plan)


def _empty_output(query, *_):
    """Memory for out and lse; also what torch.compile traces with."""
    wide = torch.promote_types(query.dtype, torch.float32)
    return torch.empty_like(query, memory_format=torch.contiguous_format), query.new_empty(query.shape[:3], dtype=wide)


attention.register_fake(_empty_output)


@torch.library.custom_op("aff::attention_backward", mutates_args=())
def attention_backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    kv: Tensor,
    blank: Tensor,
    weight: Tensor,
    bias: Tensor,
    members: Tensor,
    path: str,
    plan: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, kv, blank, weight and bias from that of ``out``."""
    inputs = (grad_out, out, lse, query, kv, blank, weight, bias)
    if query.shape[0] == 0:
        return tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs[3:])
    return dispatch.run("attention", path, _BACKWARD[path], *inputs, members, plan)


@attention_backward.register_fake
def _(grad_out, out, lse, query, kv, blank, weight, bias, members, path, plan):
    return tuple(x.new_empty(x.shape) for x in (query, kv, blank, weight, bias))


def _save(ctx, inputs, output):
    *tensors, ctx.path, plan = inputs
    ctx.save_for_backward(*output, *tensors, *plan)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_out, _):
    out, lse, *rest = ctx.saved_tensors
    tensors, plan = rest[:6], rest[6:]
    grads = (None,) * 5
    if grad_out is not None:
        grads = torch.ops.aff.attention_backward(grad_out, out, lse, *tensors, ctx.path, plan)
    return *grads, None, None, [None] * len(plan)


attention.register_autograd(_differentiate, setup_context=_save)


def _split(x, members):
    """(B, k m, ...) -> (B, k, m, ...)."""
    return x.unflatten(1, members.shape[1:])


def _clusters_forward(query, kv, blank, weight, bias, members, plan):
    parts = (_split(x, members) for x in (query, kv))
    return tuple(x.flatten(1, 2) for x in clusters.forward(*parts, blank, weight, bias, clusters_plan.plan_of(plan)))


def _clusters_backward(grad_out, out, lse, query, kv, blank, weight, bias, members, plan):
    parts = (_split(x, members) for x in (grad_out, out, lse, query, kv))
    grad_query, grad_kv, *rest = clusters.backward(*parts, blank, weight, bias, clusters_plan.plan_of(plan))
    return grad_query.flatten(1, 2), grad_kv.flatten(1, 2), *rest


def _triton_forward(query, kv, blank, weight, bias, members, plan):
    from . import triton

    return triton.forward(query, kv, blank, weight, bias, triton_plan.plan_of(plan, members))


def _triton_backward(grad_out, out, lse, query, kv, blank, weight, bias, members, plan):
    from . import triton

    return triton.backward(grad_out, out, lse, query, kv, blank, weight, bias, triton_plan.plan_of(plan, members))


def _cpu_forward(query, kv, blank, weight, bias, members, plan):
    return cpu.forward(query, kv, blank, weight, bias, cpu.Plan(*plan), members)


def _cpu_backward(grad_out, out, lse, query, kv, blank, weight, bias, members, plan):
    return cpu.backward(grad_out, out, lse, query, kv, blank, weight, bias, cpu.Plan(*plan), members)


_FORWARD = {"triton": _triton_forward, "cpu": _cpu_forward, "clusters": _clusters_forward}
_BACKWARD = {"triton": _triton_backward, "cpu": _cpu_backward, "clusters": _clusters_backward}


@dispatch.trial("attention")
def _trial(path, device):
    """Out and gradients of two clusters of 8 tokens that see each other, 2 heads of 16 channels."""
    size = 16
    shapes = (1, size, 2, 16), (1, size, 2, 2, 16), (2, 2, 16), (2, 5), (2,)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
    number = torch.arange(size, device=device)
    positions = torch.stack([number % 5, number // 5], dim=-1)[None]
    members, nearest = number.view(1, 2, 8), torch.tensor([0, 1], device=device).expand(1, size, 2)
    if path == "plain":
        query, kv, blank, weight, bias = inputs
        position = linear(relative_position(positions[:, None] - positions[:, :, None]), weight, bias)
        everyone = number.expand(1, size, size)
        out = plain.local_attention(query, *kv.unbind(3), everyone, None, position, *blank.unbind(1))
    else:
        out = attention(*inputs, members, path, make_plan(path, positions, members, nearest))[0]
    *grads, _ = torch.autograd.grad(out.square().sum(), inputs)  # the bias's is nearly 0
    return [out.detach(), *grads]
