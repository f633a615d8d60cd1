"""``aff::attention`` and its backward as operators of torch.library: one opaque step for torch.compile and CUDA graphs.

Which path runs is looked up when an operator is called (``dispatch``). Forward and backward agree on the log-sum-exp of
each token's logits, so either can fall back alone.
"""

from functools import partial

import torch
from torch import Tensor

from .. import dispatch
from . import clusters
from .clusters_plan import PLAN_SIZES, attention_plan


@torch.library.custom_op("aff::attention", mutates_args=())
def attention(
    query: Tensor,
    key_value: Tensor,
    blank: Tensor,
    weight: Tensor,
    bias: Tensor,
    positions: Tensor,
    members: Tensor,
    nearest: Tensor,
    plan: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """Attend, as ``attention.attention_by_clusters`` says; the last four are fields of a StageGeometry ``in_clusters``.

    Returns out (B, k m, H, d) and the log-sum-exp of the logits (B, k m, H), in float32 or wider.
    """
    inputs = (query, key_value, blank, weight, bias)
    if len(query) == 0:
        return _empty_output(*inputs)
    return _run(0, inputs, query, positions, members, nearest, plan)


def _empty_output(query, *_):
    """Room for out and lse; also what torch.compile traces with."""
    wide = torch.promote_types(query.dtype, torch.float32)
    return torch.empty_like(query, memory_format=torch.contiguous_format), query.new_empty(query.shape[:3], dtype=wide)


attention.register_fake(_empty_output)


@torch.library.custom_op("aff::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key_value: Tensor,
    blank: Tensor,
    weight: Tensor,
    bias: Tensor,
    positions: Tensor,
    members: Tensor,
    nearest: Tensor,
    plan: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key_value, blank, weight and bias from that of ``out``."""
    inputs = (grad, out, lse, query, key_value, blank, weight, bias)
    if len(query) == 0:
        return tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs[3:])
    return _run(1, inputs, query, positions, members, nearest, plan)


@attention_backward.register_fake
def _(grad, out, lse, query, key_value, blank, weight, bias, positions, members, nearest, plan):
    return tuple(x.new_empty(x.shape) for x in (query, key_value, blank, weight, bias))


def _save(ctx, inputs, output):
    *tensors, plan = inputs
    ctx.save_for_backward(*output, *tensors, *plan)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _):
    out, lse, *rest = ctx.saved_tensors
    tensors, plan = rest[:8], rest[8:]
    grads = (None,) * 5 if grad is None else torch.ops.aff.attention_backward(grad, out, lse, *tensors, plan)
    return *grads, None, None, None, [None] * len(plan)


attention.register_autograd(_differentiate, setup_context=_save)


def _run(direction, inputs, query, positions, members, nearest, plan):
    """Forward (0) or backward (1) by the path that is taken; a plan made for another path is made anew."""

    def by(path):
        wide = torch.promote_types(query.dtype, torch.float32)
        fits = len(plan) == PLAN_SIZES[path]
        return _KERNELS[path][direction](
            *inputs, members, plan if fits else attention_plan(positions, members, nearest, wide, path)
        )

    return dispatch.run("attention", query.device, {path: partial(by, path) for path in _KERNELS})


def _split(x, members):
    """(B, k m, ...) -> (B, k, m, ...)."""
    return x.unflatten(1, members.shape[1:])


def _clusters_forward(query, key_value, blank, weight, bias, members, plan):
    parts = (_split(x, members) for x in (query, key_value))
    return tuple(x.flatten(1, 2) for x in clusters.forward(*parts, blank, weight, bias, *plan))


def _clusters_backward(grad, out, lse, query, key_value, blank, weight, bias, members, plan):
    parts = (_split(x, members) for x in (grad, out, lse, query, key_value))
    own, pair, *rest = clusters.backward(*parts, blank, weight, bias, *plan)
    return own.flatten(1, 2), pair.flatten(1, 2), *rest


def _triton_forward(query, key_value, blank, weight, bias, members, plan):
    from . import triton as fused

    return fused.forward(query, key_value, blank, weight, bias, fused.plan_of(plan, members))


def _triton_backward(grad, out, lse, query, key_value, blank, weight, bias, members, plan):
    from . import triton as fused

    return fused.backward(grad, out, lse, query, key_value, blank, weight, bias, fused.plan_of(plan, members))


_KERNELS = {
    "triton": (_triton_forward, _triton_backward),
    "clusters": (_clusters_forward, _clusters_backward),
    "gather": (_clusters_forward, _clusters_backward),  # asked for directly: the plain form is no operator
}
