"""Reading the values of tokens at locations between them (paper sec. 4.1), as an operator with several paths.

out = sum_p attention_p sum_k w_pk value_k, with w of ``plain.shepard_weights``. ``aff::sample`` and
``aff::sample_backward`` are one opaque step for torch.compile and CUDA graphs.
"""

import torch
from torch import Tensor

from ...checks import check_arrays
from .. import dispatch
from . import plain


def sample(sampling_locations, attention, positions, values, nearest, half_power):
    """Read the values of tokens at sampling locations, by Shepard interpolation.

    Parameters
    ----------
    sampling_locations : (B, q, H, P, 2) tensor
        (x, y) in the unit of the positions; any real or integer dtype.
    attention : (B, q, H, P) floating tensor or None
        Attention weights of the locations; None: 1.
    positions : (B or 1, n, 2) int64 tensor
    values : (B, n, H, d) floating tensor
    nearest : (B, q, H, P, k) integer tensor
        Tokens that each location is read from, at least one; negative where there are fewer than k.
    half_power : (1,) floating tensor
        a, half the power of the distance.

    Returns
    -------
    (B, q, H, d) tensor
        In the dtype of ``values``.
    """
    check_arrays(
        sampling_locations=(sampling_locations, "real or whole", "B q H P 2"), values=(values, "real", "B n H d"),
        nearest=(nearest, "whole", "B q H P k"), positions=(positions, "whole", "images n 2"),
    )  # fmt: skip
    path = dispatch.path("sampling", values.device)
    inputs = sampling_locations, attention, positions, values, nearest, half_power
    return plain.sample(*inputs) if path == "plain" else _sample(*inputs, path)


def sample_levels(offsets, logits, tables, positions, values, half_power, grid_size):
    """Let every token read the values of several levels, each location from the 4 tokens nearest to its cell.

    Parameters
    ----------
    offsets : (B, n, H, L, P, 2) floating tensor
        (x, y), cells: of the locations from the token's own position.
    logits : (B, n, H, L, P) floating tensor
        Attention weights of the locations are their softmax over L and P.
    tables : (L, B, h w, 4) int32 tensor
        The nearest tokens of every cell among the level's own, nearest first, numbered over all levels; -1 where a
        level has fewer than four (``deformable.lookup_tables``).
    positions : (B, n, 2) int64 tensor
        Of the tokens of all levels, one level after the other.
    values : (B, n, H, d) floating tensor
    half_power : (1,) floating tensor
    grid_size : (h, w)

    Returns
    -------
    (B, n, H, d) tensor
        In the dtype of ``values``.
    """
    check_arrays(
        offsets=(offsets, "real", "B n H L P 2"), logits=(logits, "real", "B n H L P"),
        values=(values, "real", "B n H d"), positions=(positions, "whole", "images n 2"),
        tables=(tables, "whole", "L B cells 4"),
    )  # fmt: skip
    path = dispatch.path("sampling", values.device)
    if path == "cpu":
        return _sample_levels(offsets, logits, tables, positions, values, half_power, *grid_size)
    sampling_locations = positions[:, :, None, None, None] + offsets
    nearest = plain.nearest_of_levels(sampling_locations, tables, grid_size).flatten(3, 4)
    attention = logits.flatten(3).softmax(dim=-1)
    return sample(sampling_locations.flatten(3, 4), attention, positions, values, nearest, half_power)


@torch.library.custom_op("aff::sample", mutates_args=())
def _sample(
    sampling_locations: Tensor,
    attention: Tensor | None,
    positions: Tensor,
    values: Tensor,
    nearest: Tensor,
    half_power: Tensor,
    path: str,
) -> Tensor:
    """``sample`` by the kernel of a path."""
    inputs = sampling_locations, attention, positions, values, nearest, half_power
    return dispatch.run("sampling", path, _kernel(path).forward, *inputs)


@_sample.register_fake
def _(sampling_locations, attention, positions, values, nearest, half_power, path):
    return values.new_empty(*nearest.shape[:3], values.shape[3])


@torch.library.custom_op("aff::sample_backward", mutates_args=())
def _sample_backward(
    grad_out: Tensor,
    sampling_locations: Tensor,
    attention: Tensor | None,
    positions: Tensor,
    values: Tensor,
    nearest: Tensor,
    half_power: Tensor,
    path: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of sampling_locations (empty: integers), attention (empty without it), values and half_power."""
    inputs = grad_out, sampling_locations, attention, positions, values, nearest, half_power
    grads = dispatch.run("sampling", path, _kernel(path).backward, *inputs)
    return tuple(values.new_empty(0) if g is None else g for g in grads)


@_sample_backward.register_fake
def _(grad_out, sampling_locations, attention, positions, values, nearest, half_power, path):
    grads = sampling_locations if sampling_locations.is_floating_point() else None, attention, values, half_power
    return tuple(values.new_empty(0) if g is None else g.new_empty(g.shape) for g in grads)


def _save(ctx, inputs, output):
    *tensors, ctx.path = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad_out):
    sampling_locations, attention, *rest = ctx.saved_tensors
    grads = torch.ops.aff.sample_backward(grad_out, sampling_locations, attention, *rest, ctx.path)
    grad_locations = grads[0] if sampling_locations.is_floating_point() else None
    return grad_locations, None if attention is None else grads[1], None, grads[2], None, grads[3], None


_sample.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("aff::sample_levels", mutates_args=())
def _sample_levels(
    offsets: Tensor,
    logits: Tensor,
    tables: Tensor,
    positions: Tensor,
    values: Tensor,
    half_power: Tensor,
    h: int,
    w: int,
) -> Tensor:
    """``sample_levels`` by the compiled CPU kernel, which looks the tokens up itself."""
    inputs = offsets, logits, tables, positions, values, half_power, (h, w)
    return dispatch.run("sampling", "cpu", _kernel("cpu").sample_levels, *inputs)


@_sample_levels.register_fake
def _(offsets, logits, tables, positions, values, half_power, h, w):
    return values.new_empty(*offsets.shape[:3], values.shape[3])


@torch.library.custom_op("aff::sample_levels_backward", mutates_args=())
def _sample_levels_backward(
    grad_out: Tensor,
    offsets: Tensor,
    logits: Tensor,
    tables: Tensor,
    positions: Tensor,
    values: Tensor,
    half_power: Tensor,
    h: int,
    w: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of offsets, logits, values and half_power."""
    inputs = grad_out, offsets, logits, tables, positions, values, half_power, (h, w)
    return dispatch.run("sampling", "cpu", _kernel("cpu").sample_levels_backward, *inputs)


@_sample_levels_backward.register_fake
def _(grad_out, offsets, logits, tables, positions, values, half_power, h, w):
    return tuple(x.new_empty(x.shape) for x in (offsets, logits, values, half_power))


def _save_levels(ctx, inputs, output):
    *tensors, h, w = inputs
    ctx.save_for_backward(*tensors)
    ctx.grid_size = h, w


def _differentiate_levels(ctx, grad_out):
    grads = torch.ops.aff.sample_levels_backward(grad_out, *ctx.saved_tensors, *ctx.grid_size)
    return grads[0], grads[1], None, None, grads[2], grads[3], None, None


_sample_levels.register_autograd(_differentiate_levels, setup_context=_save_levels)


def _kernel(path):
    """The module of a path's kernels."""
    if path == "triton":
        from . import triton

        return triton
    from . import cpu

    return cpu


@dispatch.trial("sampling")
def _trial(path, device):
    """Result and gradients of 5 queries, 2 heads, 3 locations, read from 4 of 12 tokens each."""
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 5, 2, 3, 2), (1, 5, 2, 3), (1, 12, 2, 16)
    inputs = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
    inputs.append(torch.full((1,), 1.5, device=device, requires_grad=True))
    number = torch.arange(12, device=device)
    positions, nearest = torch.stack([number % 4, number // 4], dim=-1)[None], number.repeat(10).view(1, 5, 2, 3, 4)
    sampling_locations, attention, values, half_power = inputs
    with dispatch.force(sampling=path):
        out = sample(sampling_locations, attention, positions, values, nearest, half_power)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]
