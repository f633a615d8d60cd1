"""Picking rows of tensors by index, in pieces that fit a cache; and full precision under autocast."""

import torch
from torch.utils.checkpoint import checkpoint

AT_ONCE = 2**22  # numbers that ``tokenwise`` has at a time


def tokenwise(function, x, channels, modules=()):
    """Apply to x (B, n, ...) a function that treats every token for itself: -> (B, n, ...).

    On a CPU, without gradients, and where nobody watches the ``modules`` by hooks, many tokens are taken piece by
    piece: what lies between input and result, up to ``channels`` numbers a token, stays in the cache.
    """
    batch, n = x.shape[:2]
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.is_grad_enabled()
        or x.device.type != "cpu"
        or batch * n * channels < 2 * AT_ONCE
        or any(map(has_hooks, modules))
    ):
        return function(x)
    out, size = None, max(1, AT_ONCE // (batch * channels))
    for start in range(0, n, size):
        part = function(x[:, start : start + size])
        out = part.new_empty(batch, n, *part.shape[2:]) if out is None else out
        out[:, start : start + size] = part
    return out


def has_hooks(module):
    """Whether somebody wants to see or to change what goes through a module."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def gather_rows(x, index, batch_axis=0):
    """Return rows of x (..., B, n, ...) by index (B, ...): -> (..., B, ..., ...), the index's axes in place of n.

    ``batch_axis`` is where x has its batch; the axis after it is picked from.
    """
    start = x.shape[batch_axis + 1] * torch.arange(index.shape[0], device=x.device)
    flat = (index + start.view(-1, *[1] * (index.ndim - 1))).flatten()
    picked = x.flatten(batch_axis, batch_axis + 1).index_select(batch_axis, flat)
    return picked.unflatten(batch_axis, index.shape)


def autocast_device(x):
    """Return the device type to switch autocast off for, ``torch.autocast(autocast_device(x), enabled=False)``.

    Tensors without numbers (device "meta") have no autocast: the CPU's is harmless to them.
    """
    return "cpu" if x.is_meta else x.device.type


def weighted_sum(weights, rows):
    """Sum rows (..., M, d) with weights (..., M) of the same dtype: -> (..., d)."""
    return _WeightedSum.apply(weights, rows)


class _WeightedSum(torch.autograd.Function):
    """A product of matrices forward; backward, as one of a column and a row, it would take a CPU much longer."""

    @staticmethod
    def forward(ctx, weights, rows):
        ctx.save_for_backward(weights, rows)
        return (weights[..., None, :] @ rows).squeeze(-2)

    @staticmethod
    def backward(ctx, grad):
        weights, rows = ctx.saved_tensors
        grad = grad.to(rows.dtype)  # under autocast the sum may be in 16 bits
        return (rows @ grad[..., None]).squeeze(-1), weights[..., None] * grad[..., None, :]


def recomputed(function, *tensors):
    """Call a function; its backward pass calls it again, and nothing but its arguments is kept for that."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)
    return function(*tensors)


def token_slices(neighbors, channels):
    """Cut the tokens of neighbors (B, n, M) into slices whose gathered neighbourhoods are small.

    A token gathers M x ``channels`` numbers. On a CPU a slice fits its cache, which makes gathering several times as
    fast; elsewhere it only bounds memory.
    """
    n, slots = neighbors.shape[1:]
    if torch.compiler.is_exporting():
        return [slice(0, n)]  # the number of slices would follow the batch, which may be free
    elements = 1 << 20 if neighbors.device.type == "cpu" else 1 << 28
    rows = max(1, elements // max(1, slots * channels))
    return [slice(start, start + rows) for start in range(0, max(1, n), rows)]
