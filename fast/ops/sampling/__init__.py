"""``aff::read_places`` and its backward as operators of torch.library: one opaque step for torch.compile, CUDA graphs.

They read values at places between tokens: out = sum_p attention_p sum_k w_pk value_k, with w of
``interpolation.shepard_weights``. Which path runs is looked up when an operator is called (``dispatch``), so forward
and backward can fall back alone. The plain backward is written by hand, because an operator's inside is hidden from
autograd.
"""

import torch
from torch import Tensor

from .. import dispatch
from ..csr import scatter_rows, transpose
from ..indexing import gather_rows

FLOOR = 1e-11  # added to (d^2)^a, so that a token's own place is no division by zero


@torch.library.custom_op("aff::read_places", mutates_args=())
def read_places(
    places: Tensor, attention: Tensor | None, positions: Tensor, values: Tensor, nearest: Tensor, half_power: Tensor
) -> Tensor:
    """Read the values of tokens at places.

    Parameters
    ----------
    places : (B, q, H, P, 2) tensor
        (x, y) in the unit of the positions; any real or integer dtype.
    attention : (B, q, H, P) floating tensor or None
        None: 1.
    positions : (B or 1, n, 2) int64 tensor
    values : (B, n, H, d) floating tensor
    nearest : (B, q, H, P, k) integer tensor
        Tokens that each place is read from, at least one; negative where there are fewer than k.
    half_power : (1,) floating tensor
        a, half the power of the distance.

    Returns
    -------
    (B, q, H, d) tensor
        In the dtype of ``values``.
    """
    inputs = places, attention, positions, values, nearest, half_power
    return dispatch.run(
        "interpolation",
        values.device,
        {"triton": lambda: _fused().forward(*inputs), "gather": lambda: _plain(*inputs)},
    )


@read_places.register_fake
def _(places, attention, positions, values, nearest, half_power):
    return values.new_empty(*nearest.shape[:3], values.shape[3])


@torch.library.custom_op("aff::read_places_backward", mutates_args=())
def read_places_backward(
    grad: Tensor,
    places: Tensor,
    attention: Tensor | None,
    positions: Tensor,
    values: Tensor,
    nearest: Tensor,
    half_power: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of places (empty if they are integers), attention (empty without it), values and half_power."""
    inputs = grad, places, attention, positions, values, nearest, half_power
    grads = dispatch.run(
        "interpolation",
        values.device,
        {"triton": lambda: _fused().backward(*inputs), "gather": lambda: _plain_backward(*inputs)},
    )
    return tuple(values.new_empty(0) if g is None else g for g in grads)


@read_places_backward.register_fake
def _(grad, places, attention, positions, values, nearest, half_power):
    grads = places if places.is_floating_point() else None, attention, values, half_power
    return tuple(values.new_empty(0) if g is None else g.new_empty(g.shape) for g in grads)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad):
    places, attention, *rest = ctx.saved_tensors
    grads = torch.ops.aff.read_places_backward(grad, places, attention, *rest)
    grad_places = grads[0] if places.is_floating_point() else None
    return grad_places, None if attention is None else grads[1], None, grads[2], None, grads[3]


read_places.register_autograd(_differentiate, setup_context=_save)


def _fused():
    from . import triton

    return triton


def _wide(places, attention, values):
    floating = [x.dtype for x in (places, attention, values) if x is not None and x.is_floating_point()]
    return torch.float64 if torch.float64 in floating else torch.float32


def _weights(places, positions, nearest, half_power, wide):
    """Shepard's weights (B, q, H, P, k), d^2a / (d^2a + floor), d^2 with 1 for 0, and place - token."""
    missing = nearest < 0
    away = places.to(wide)[..., None, :] - gather_rows(positions.expand(len(nearest), -1, -1), nearest.clamp(min=0))
    squared = away.square().sum(dim=-1)
    own = squared == 0
    squared = squared.masked_fill(own, 1)
    power = (squared ** half_power.to(wide)).masked_fill(own, 0)
    u = (1 / (power + FLOOR)).masked_fill(missing, 0)
    return u / u.sum(dim=-1, keepdim=True), power / (power + FLOOR), squared, away


def _sources(nearest, values):
    """Numbers of (token, head) that are read: (B, q, H, P, k), negative for none."""
    head = torch.arange(values.shape[2], device=values.device)[:, None, None]
    return torch.where(nearest < 0, -1, nearest * values.shape[2] + head)


def _plain(places, attention, positions, values, nearest, half_power):
    wide = _wide(places, attention, values)
    weight = _weights(places, positions, nearest, half_power, wide)[0]
    if attention is not None:
        weight = weight * attention[..., None]
    near = gather_rows(values.flatten(1, 2), _sources(nearest, values).clamp(min=0)).to(wide)  # (B, q, H, P, k, d)
    return torch.einsum("bqhpk,bqhpkd->bqhd", weight.to(wide), near).to(values.dtype)


def _plain_backward(grad, places, attention, positions, values, nearest, half_power):
    wide = _wide(places, attention, values)
    weight, share, squared, away = _weights(places, positions, nearest, half_power, wide)
    sources = _sources(nearest, values)
    near = gather_rows(values.flatten(1, 2), sources.clamp(min=0)).to(wide)
    products = torch.einsum("bqhd,bqhpkd->bqhpk", grad.to(wide), near)
    factor = 1 if attention is None else attention.to(wide)[..., None]
    grad_attention = None if attention is None else (weight * products).sum(dim=-1).to(attention.dtype)
    products = (products - products[..., :1]) * factor  # the shift changes nothing but rounding: sum w = 1
    slope = share * weight * ((weight * products).sum(dim=-1, keepdim=True) - products)  # by a ln(d^2)
    grad_places = None
    if places.is_floating_point():
        grad_places = (2 * half_power.to(wide) * slope / squared)[..., None].mul(away).sum(dim=-2).to(places.dtype)
    rows = ((weight * factor)[..., None] * grad.to(wide)[:, :, :, None, None]).flatten(1, 4)
    lists = transpose(sources.flatten(2), values.shape[1] * values.shape[2])
    grad_values = scatter_rows(rows, *lists).view_as(values).to(values.dtype)
    return grad_places, grad_attention, grad_values, (slope * squared.log()).sum().to(half_power.dtype).view(1)
