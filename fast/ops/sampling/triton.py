"""Reading the values of tokens at locations between them (paper sec. 4.1), fused: Shepard interpolation and attention.

A row is one query and head; it reads P locations, each from its k = 4 nearest tokens:

    out_h = sum_p attention_p sum_k w_pk value_kh,    w = u / sum u,    u = 1 / ((d^2)^a + 1e-11).

The weights are computed from the locations inside the kernels, again in the backward pass. As in ``interpolation``, a
token at distance 0 is kept out of the power: no gradient passes through its distance. The backward pass has no atomic
additions: a value collects from the rows that read it (``transpose``), so the same input gives the same bits.

Everything is computed in float32 (float64 for float64 inputs), whatever the inputs' dtype.
"""

import torch
import triton
import triton.language as tl

from ..csr import transpose
from ..triton_sizes import TYPES, check_count, tile, warps, wide_type

FLOOR = tl.constexpr(1e-11)  # of interpolation.shepard_weights
LOG_2 = tl.constexpr(0.6931471805599453)  # natural logarithm
POINTS = 4  # locations read at a time, at most; the power of two divides P
ENTRIES = 16  # rows that a value collects from at a time


@triton.jit
def _nearest_tokens(
    sampling_locations, positions, nearest, row, point, P, k, BLOCK_K: tl.constexpr, WIDE: tl.constexpr
):
    """Tokens that the locations (r, p) of rows are read from, -1 for none, and location - token: each (r, p, k)."""
    location = row[:, None] * P + point[None, :]
    x = tl.load(sampling_locations + 2 * location).to(WIDE)
    y = tl.load(sampling_locations + 2 * location + 1).to(WIDE)
    number = tl.arange(0, BLOCK_K)[None, None, :]
    token = tl.load(nearest + location[:, :, None] * k + number, mask=number < k, other=-1).to(tl.int64)
    address = positions + 2 * tl.maximum(token, 0)
    return token, x[:, :, None] - tl.load(address).to(WIDE), y[:, :, None] - tl.load(address + 1).to(WIDE)


@triton.jit
def _shepard(token, squared, half_power):
    """From squared distances (r, p, k): the weights w, and the derivatives of -ln u by a ln d^2 and by a ln 2.

    u is computed times d0^2a, d0 the least distance but at least 1: that loses fewer digits and cannot overflow. The
    second derivative is that of the scaled u; what it leaves out, the floor's part, is 1e-11 of the whole where d0 > 1.
    """
    base = tl.maximum(tl.min(squared, axis=2), 1)[:, :, None]
    logarithm = tl.log2(tl.where(squared == 0, 1, squared / base))
    power = tl.where(squared == 0, 0, tl.exp2(half_power * logarithm))
    floor = FLOOR * tl.exp2(-half_power * tl.log2(base))
    u = tl.where(token >= 0, 1 / (power + floor), 0)
    share = tl.where(u == 0, 1, power * u)  # 1 where the power overflows
    return u / tl.sum(u, axis=2)[:, :, None], share, share * logarithm


@triton.jit
def _read(
    sampling_locations,  # (R, P, 2), R = B q H rows
    attention,  # (R, P) or None
    positions,  # (B or 1, n, 2)
    values,  # (B, n, H, d)
    nearest,  # (R, P, k)
    half_power,  # (1,)
    out,  # (R, d)
    R,
    n,
    rows_per_image,
    H,
    P,
    k,
    d,
    position_stride,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_R rows, BLOCK_D channels."""
    numbers = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = tl.minimum(numbers, R - 1)
    image = row // rows_per_image
    positions += (image * position_stride)[:, None, None]
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    a = tl.load(half_power).to(WIDE)
    total = tl.zeros((BLOCK_R, BLOCK_D), WIDE)
    for begin in range(0, P, BLOCK_P):
        point = begin + tl.arange(0, BLOCK_P)
        token, dx, dy = _nearest_tokens(sampling_locations, positions, nearest, row, point, P, k, BLOCK_K, WIDE)
        w, _, _ = _shepard(token, dx * dx + dy * dy, a)
        if attention is not None:
            w *= tl.load(attention + row[:, None] * P + point[None, :]).to(WIDE)[:, :, None]
        w = tl.reshape(w, (BLOCK_R, BLOCK_P * BLOCK_K))
        token = tl.reshape(token, (BLOCK_R, BLOCK_P * BLOCK_K))
        source = ((image * n)[:, None] + token) * H + (row % H)[:, None]
        mask = (token >= 0)[:, :, None] & (channel < d)[None, None, :]
        v = tl.load(values + source[:, :, None] * d + channel[None, None, :], mask=mask, other=0).to(WIDE)
        total += tl.sum(w[:, :, None] * v, axis=1)
    mask = (numbers < R)[:, None] & (channel < d)[None, :]
    tl.store(out + row[:, None] * d + channel[None, :], total, mask=mask)


@triton.jit
def _place_gradients(
    grad,  # (R, d)
    sampling_locations,
    attention,
    positions,
    values,
    nearest,
    half_power,
    weights,  # (R, P, k): attention times Shepard weight of every token read, for _value_gradients
    grad_locations,  # (R, P, 2) or None
    grad_attention,  # (R, P) or None
    partial,  # (programs,), to sum to the gradient of half_power
    R,
    n,
    rows_per_image,
    H,
    P,
    k,
    d,
    position_stride,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_R rows."""
    numbers = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = tl.minimum(numbers, R - 1)
    image = row // rows_per_image
    positions += (image * position_stride)[:, None, None]
    a = tl.load(half_power).to(WIDE)
    mine = (numbers < R)[:, None]
    power_gradient = tl.zeros((BLOCK_R,), WIDE)
    for begin in range(0, P, BLOCK_P):
        point = begin + tl.arange(0, BLOCK_P)
        location = row[:, None] * P + point[None, :]
        token, dx, dy = _nearest_tokens(sampling_locations, positions, nearest, row, point, P, k, BLOCK_K, WIDE)
        squared = dx * dx + dy * dy
        w, share, by_power = _shepard(token, squared, a)
        flat = tl.reshape(token, (BLOCK_R, BLOCK_P * BLOCK_K))
        source = ((image * n)[:, None] + flat) * H + (row % H)[:, None]
        dw = tl.zeros((BLOCK_R, BLOCK_P * BLOCK_K), WIDE)  # grad . value
        for start in range(0, d, BLOCK_D):
            channel = start + tl.arange(0, BLOCK_D)
            mask = (flat >= 0)[:, :, None] & (channel < d)[None, None, :]
            v = tl.load(values + source[:, :, None] * d + channel[None, None, :], mask=mask, other=0).to(WIDE)
            g = tl.load(grad + row[:, None] * d + channel[None, :], mask=(channel < d)[None, :], other=0).to(WIDE)
            dw += tl.sum(g[:, None, :] * v, axis=2)
        dw = tl.reshape(dw, (BLOCK_R, BLOCK_P, BLOCK_K))
        used = w
        if attention is not None:
            tl.store(grad_attention + location, tl.sum(w * dw, axis=2), mask=mine)
            factor = tl.load(attention + location).to(WIDE)[:, :, None]
            used = w * factor
            dw *= factor
        number = tl.arange(0, BLOCK_K)[None, None, :]
        tl.store(weights + location[:, :, None] * k + number, used, mask=mine[:, :, None] & (number < k))
        dw -= tl.sum(tl.where(number == 0, dw, 0), axis=2)[:, :, None]  # changes nothing but rounding: sum w = 1
        slope = w * (tl.sum(w * dw, axis=2)[:, :, None] - dw)  # by -ln u
        if grad_locations is not None:
            per_square = 2 * a * share * slope / tl.where(squared == 0, 1, squared)
            tl.store(grad_locations + 2 * location, tl.sum(per_square * dx, axis=2), mask=mine)
            tl.store(grad_locations + 2 * location + 1, tl.sum(per_square * dy, axis=2), mask=mine)
        power_gradient += tl.sum(tl.sum(slope * by_power, axis=2), axis=1)
    power_gradient = tl.where(numbers < R, power_gradient, 0)
    tl.store(partial + tl.program_id(0), tl.sum(power_gradient, axis=0) * LOG_2)


@triton.jit
def _value_gradients(
    grad,  # (R, d)
    weights,  # (R, P k)
    offsets,  # (B, n H + 1)
    entries,  # (B, q H P k)
    grad_values,  # (B, n H, d)
    values_per_image,  # n H
    rows_per_image,  # q H
    slots,  # P k
    d,
    WIDE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: one token's value of one head collects from all rows that read it, BLOCK_D channels."""
    value = tl.program_id(0).to(tl.int64)
    image = value // values_per_image
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.load(offsets + value + image)  # each image has one offset more than values
    last = tl.load(offsets + value + image + 1)
    total = tl.zeros((BLOCK_D,), WIDE)
    for begin in range(first, last, BLOCK_E):
        number = begin + tl.arange(0, BLOCK_E)
        entry = tl.load(entries + image * rows_per_image * slots + number, mask=number < last, other=0)
        row = image * rows_per_image + entry.to(tl.int32) // slots
        w = tl.load(weights + image * rows_per_image * slots + entry, mask=number < last, other=0)
        g = tl.load(grad + row[:, None] * d + channel[None, :], mask=(channel < d)[None, :], other=0).to(WIDE)
        total += tl.sum(w[:, None] * g, axis=0)
    tl.store(grad_values + value * d + channel, total, mask=channel < d)


def forward(sampling_locations, attention, positions, values, nearest, half_power):
    """Read the values of tokens at locations.

    Parameters
    ----------
    sampling_locations : (B, q, H, P, 2) tensor
        (x, y) in the unit of the positions; any real or integer dtype.
    attention : (B, q, H, P) floating tensor or None
        None: 1.
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

    Raises
    ------
    ValueError
        More rows than one launch holds.
    """
    batch, queries, heads, _, k = nearest.shape
    d = values.shape[3]
    check_count(batch * queries * heads, "queries times heads")
    out = values.new_empty(batch, queries, heads, d)
    if out.numel() == 0:
        return out
    tensors = tuple(
        x if x is None else x.contiguous() for x in (sampling_locations, attention, positions, values, nearest)
    )
    blocks = _blocks(values, nearest)
    grid = triton.cdiv(batch * queries * heads, blocks["BLOCK_R"]), triton.cdiv(d, blocks["BLOCK_D"])
    with torch.cuda.device_of(values):
        _read[grid](*tensors, half_power, out, *_sizes(positions, values, nearest), **_settings(blocks, *tensors))
    return out


def backward(grad, sampling_locations, attention, positions, values, nearest, half_power):
    """Gradients of ``forward``: its arguments after ``grad`` (B, q, H, d), the gradient of its result.

    Returns
    -------
    tuple of tensors
        Gradients of sampling_locations (None if they are integers), attention (None without it), values, half_power,
        each in its input's dtype.

    Raises
    ------
    ValueError
        More rows or values than one launch holds.
    """
    batch, queries, heads, points, k = nearest.shape
    n, d = values.shape[1], values.shape[3]
    check_count(batch * heads * max(queries, n), "queries or tokens times heads")
    check_count(nearest[:1].numel(), "slots of an image")
    grads = [
        torch.zeros_like(sampling_locations, memory_format=torch.contiguous_format)
        if sampling_locations.is_floating_point()
        else None,
        None if attention is None else torch.zeros_like(attention, memory_format=torch.contiguous_format),
        torch.zeros_like(values, memory_format=torch.contiguous_format),
        torch.zeros_like(half_power),
    ]
    if 0 in (batch, queries, heads, n, d):
        return tuple(grads)
    grad = grad.contiguous()
    tensors = tuple(
        x if x is None else x.contiguous() for x in (sampling_locations, attention, positions, values, nearest)
    )
    blocks = _blocks(values, nearest)
    settings = _settings(blocks, *tensors)
    programs = triton.cdiv(batch * queries * heads, blocks["BLOCK_R"])
    weights = values.new_empty(batch, queries, heads, points, k, dtype=wide_type(*tensors))
    partial = weights.new_empty(programs)
    with torch.cuda.device_of(values):
        _place_gradients[(programs,)](
            *(grad, *tensors, half_power, weights, *grads[:2], partial),
            *_sizes(positions, values, nearest),
            **settings,
        )
        _backward_values(grad, weights, nearest, grads[2], settings["WIDE"])
    grads[3] = partial.sum().to(half_power.dtype).view_as(half_power)
    return tuple(grads)


def _backward_values(grad, weights, nearest, grad_values, wide):
    batch, queries, heads, points, k = nearest.shape
    n, d = grad_values.shape[1], grad_values.shape[3]
    head = torch.arange(heads, device=nearest.device)[:, None, None]
    read = torch.where(nearest < 0, -1, nearest * heads + head).flatten(2)  # numbers of (token, head)
    block_d = tile(d, 64)
    _value_gradients[batch * n * heads, triton.cdiv(d, block_d)](
        *(grad, weights, *transpose(read, n * heads), grad_values),
        *(n * heads, queries * heads, points * k, d),
        WIDE=wide,
        BLOCK_E=ENTRIES,
        BLOCK_D=block_d,
        enable_fp_fusion=True,
        num_warps=warps(ENTRIES * block_d),
    )


def _sizes(positions, values, nearest):
    """The integers of ``_read`` and ``_place_gradients``, from R on."""
    batch, queries, heads, points, k = nearest.shape
    n, d = values.shape[1], values.shape[3]
    stride = 0 if len(positions) == 1 else 2 * n
    return batch * queries * heads, n, queries * heads, heads, points, k, d, stride


def _blocks(values, nearest):
    """Sizes of a program's tile: rows, locations, tokens, channels; not many more than 2048 numbers."""
    points, k = nearest.shape[3:]
    block_p, block_k, block_d = min(POINTS, points & -points), tile(k, 1 << 30), tile(values.shape[3], 64)
    rows = max(1, min(16, 2048 // (block_p * block_k * block_d)))
    return {"BLOCK_R": rows, "BLOCK_P": block_p, "BLOCK_K": block_k, "BLOCK_D": block_d}


def _settings(blocks, sampling_locations, attention, _, values, __):
    elements = blocks["BLOCK_R"] * blocks["BLOCK_P"] * blocks["BLOCK_K"] * blocks["BLOCK_D"]
    return {
        **blocks,
        "WIDE": TYPES[wide_type(sampling_locations, attention, values)],
        "num_warps": warps(elements),
        "enable_fp_fusion": True,
    }
