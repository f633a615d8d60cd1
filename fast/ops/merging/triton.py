"""Neighbourhood merging (paper sec. 3.3.1, Eq. 4), fused: u_c = vec( sum_j s_j W(p_j - p_c) f_j^T ).

The slot weights W = GELU(LayerNorm(Linear(5, 4)(e))), e the relative position, are computed from coordinates inside
the kernels, again in the backward pass: nothing of the size of the neighbourhoods is kept. The backward pass has no
atomic additions: a token collects from the centres that read it (``transpose``), the gradients of W's parameters are
summed over a buffer. So the same input gives the same bits.

Everything is computed in float32 (float64 for float64 inputs), whatever the inputs' dtype.
"""

import torch
import triton
import triton.language as tl

from ..csr import transpose
from ..triton_sizes import TYPES, check_count, tile, warps, wide_type

EPSILON = tl.constexpr(1e-5)  # of the layer norm
SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY = tl.constexpr(0.3989422804014327)  # of the normal distribution at 0: 1 / sqrt(2 pi)
ENTRIES = 16  # centres that a token collects from at a time


@triton.jit
def _relative(positions, here, there, SIGN: tl.constexpr, WIDE: tl.constexpr):
    """(dx, dy, distance, sine, cosine) of tokens ``there`` seen from ``here``, seen the other way if SIGN is -1."""
    dx = SIGN * (tl.load(positions + 2 * there) - tl.load(positions + 2 * here)).to(WIDE)
    dy = SIGN * (tl.load(positions + 2 * there + 1) - tl.load(positions + 2 * here + 1)).to(WIDE)
    distance = tl.sqrt(dx * dx + dy * dy)
    divisor = tl.where(distance == 0, 1, distance)
    return dx, dy, distance, dy / divisor, dx / divisor


@triton.jit
def _normalized(parameters, dx, dy, distance, sine, cosine):
    """Linear(5, 4) and layer norm without its gain and bias: (m, 4), and 1 / standard deviation, (m, 1)."""
    column = parameters + tl.arange(0, 4)[None, :]
    x = dx[:, None] * tl.load(column) + dy[:, None] * tl.load(column + 4) + distance[:, None] * tl.load(column + 8)
    x += sine[:, None] * tl.load(column + 12) + cosine[:, None] * tl.load(column + 16) + tl.load(column + 20)
    x -= tl.sum(x, axis=1)[:, None] / 4
    inverse = 1 / tl.sqrt(tl.sum(x * x, axis=1)[:, None] / 4 + EPSILON)
    return x * inverse, inverse


@triton.jit
def _slot_weights(parameters, positions, here, there, SIGN: tl.constexpr, WIDE: tl.constexpr):
    """W of Eq. 4: (m, 4)."""
    dx, dy, distance, sine, cosine = _relative(positions, here, there, SIGN, WIDE)
    x, _ = _normalized(parameters, dx, dy, distance, sine, cosine)
    column = parameters + tl.arange(0, 4)[None, :]
    x = x * tl.load(column + 24) + tl.load(column + 28)
    return x * (0.5 + 0.5 * tl.erf(x * SQRT_HALF))


@triton.jit
def _merge(
    features,  # (B, n, C)
    scores,  # (B, n) or None
    positions,  # (B or 1, n, 2)
    kept,  # (B, K)
    neighbors,  # (B, K, M)
    parameters,  # (8, 4)
    out,  # (B, K, 4, C)
    n,
    K,
    M,
    C,
    position_stride,
    SIGN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: one kept centre, BLOCK_C channels."""
    centre = tl.program_id(0).to(tl.int64)
    image = centre // K
    positions += image * position_stride
    here = tl.load(kept + centre)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    weight = tl.arange(0, 4)
    total = tl.zeros((4, BLOCK_C), WIDE)
    for start in range(0, M, BLOCK_M):
        slot = start + tl.arange(0, BLOCK_M)
        token = tl.load(neighbors + centre * M + slot, mask=slot < M, other=-1)
        full = token >= 0
        token = tl.where(full, token, 0)
        w = _slot_weights(parameters, positions, here, token, SIGN, WIDE)
        if scores is not None:
            w *= tl.load(scores + image * n + token).to(WIDE)[:, None]
        rows = features + (image * n + token)[:, None] * C + channel[None, :]
        f = tl.load(rows, mask=full[:, None] & (channel < C)[None, :], other=0).to(WIDE)
        for j in tl.static_range(4):
            wj = tl.sum(tl.where(weight[None, :] == j, w, 0), axis=1)
            total += tl.where(weight[:, None] == j, tl.sum(wj[:, None] * f, axis=0)[None, :], 0)
    rows = out + (centre * 4 + weight)[:, None] * C + channel[None, :]
    tl.store(rows, total, mask=(channel < C)[None, :])


@triton.jit
def _parameter_gradients(
    grad,  # (B, K, 4, C)
    features,
    scores,
    positions,
    kept,
    neighbors,
    parameters,
    partial,  # (B K, blocks of slots, 8, 4)
    n,
    K,
    M,
    C,
    position_stride,
    SIGN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: what BLOCK_M slots of one centre add to the gradients of W's parameters."""
    centre = tl.program_id(0).to(tl.int64)
    image = centre // K
    slot = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.load(neighbors + centre * M + slot, mask=slot < M, other=-1)
    full = token >= 0
    token = tl.where(full, token, 0)
    weight = tl.arange(0, 4)
    dw = tl.zeros((BLOCK_M, 4), WIDE)
    for start in range(0, C, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        rows = features + (image * n + token)[:, None] * C + channel[None, :]
        f = tl.load(rows, mask=full[:, None] & (channel < C)[None, :], other=0).to(WIDE)
        for j in tl.static_range(4):
            g = tl.load(grad + (centre * 4 + j) * C + channel, mask=channel < C, other=0).to(WIDE)
            dw += tl.where(
                weight[None, :] == j, tl.sum(f * g[None, :], axis=1)[:, None], 0
            )  # 0 in empty slots, as f is
    if scores is not None:
        dw *= tl.load(scores + image * n + token).to(WIDE)[:, None]
    positions += image * position_stride
    dx, dy, distance, sine, cosine = _relative(positions, tl.load(kept + centre), token, SIGN, WIDE)
    x, inverse = _normalized(parameters, dx, dy, distance, sine, cosine)
    gain = tl.load(parameters + 24 + weight)[None, :]
    y = x * gain + tl.load(parameters + 28 + weight)[None, :]
    dout = dw * (0.5 + 0.5 * tl.erf(y * SQRT_HALF) + y * DENSITY * tl.exp(-0.5 * y * y))
    dnormal = dout * gain
    mean = tl.sum(dnormal, axis=1)[:, None] / 4
    dhidden = inverse * (dnormal - mean - x * tl.sum(dnormal * x, axis=1)[:, None] / 4)
    sums = partial + (centre * tl.num_programs(1) + tl.program_id(1)) * 32 + weight
    tl.store(sums, tl.sum(dhidden * dx[:, None], axis=0))
    tl.store(sums + 4, tl.sum(dhidden * dy[:, None], axis=0))
    tl.store(sums + 8, tl.sum(dhidden * distance[:, None], axis=0))
    tl.store(sums + 12, tl.sum(dhidden * sine[:, None], axis=0))
    tl.store(sums + 16, tl.sum(dhidden * cosine[:, None], axis=0))
    tl.store(sums + 20, tl.sum(dhidden, axis=0))
    tl.store(sums + 24, tl.sum(dout * x, axis=0))
    tl.store(sums + 28, tl.sum(dout, axis=0))


@triton.jit
def _token_gradients(
    grad,  # (B, K, 4, C)
    features,
    scores,
    positions,
    kept,
    offsets,  # (B, n + 1)
    entries,  # (B, K M)
    parameters,
    grad_features,  # (B, n, C)
    grad_scores,  # (B, n) or None
    n,
    K,
    M,
    C,
    position_stride,
    SIGN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: one token collects from all centres that read it."""
    row = tl.program_id(0).to(tl.int64)
    image = row // n
    token = row % n
    first = tl.load(offsets + image * (n + 1) + token)
    last = tl.load(offsets + image * (n + 1) + token + 1)
    positions += image * position_stride
    weight = tl.arange(0, 4)
    score_gradient = tl.zeros((1,), WIDE)
    for start in range(0, C, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        total = tl.zeros((BLOCK_C,), WIDE)  # sum over centres of W g
        for begin in range(first, last, BLOCK_E):
            number = begin + tl.arange(0, BLOCK_E)
            entry = tl.load(entries + image * K * M + number, mask=number < last, other=0)
            centre = image * K + entry.to(tl.int32) // M
            w = _slot_weights(parameters, positions, tl.load(kept + centre), token, SIGN, WIDE)
            for j in tl.static_range(4):
                rows = grad + (centre * 4 + j)[:, None] * C + channel[None, :]
                g = tl.load(rows, mask=(number < last)[:, None] & (channel < C)[None, :], other=0).to(WIDE)
                wj = tl.sum(tl.where(weight[None, :] == j, w, 0), axis=1)
                total += tl.sum(wj[:, None] * g, axis=0)
        if scores is not None:
            f = tl.load(features + row * C + channel, mask=channel < C, other=0).to(WIDE)
            score_gradient += tl.sum(total * f, axis=0)
            total *= tl.load(scores + row).to(WIDE)
        tl.store(grad_features + row * C + channel, total, mask=channel < C)
    if scores is not None:
        tl.store(grad_scores + row + tl.arange(0, 1), score_gradient)


def forward(features, scores, positions, kept, neighbors, parameters, sign=1):
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
        Of W: the columns of the linear layer's weight, its bias, the layer norm's weight, its bias.
    sign : {1, -1}
        1: positions of the neighbours seen from the centre (merging); -1: the other way (PointConv).

    Returns
    -------
    (B, K, 4 C) tensor
        Laid out as [4][C], in the wider of the dtypes of features and scores.

    Raises
    ------
    ValueError
        More centres than one launch holds.
    """
    (batch, n, channels), (centres, slots) = features.shape, neighbors.shape[1:]
    check_count(batch * centres, "centres of neighbourhoods")
    out = features.new_empty(batch, centres, 4 * channels, dtype=_out_type(features, scores))
    if out.numel() == 0 or slots == 0:
        return out.zero_()
    wide = wide_type(features, scores)
    tensors = _contiguous(features, scores, positions, kept, neighbors)
    block_m = tile(slots, 64)
    block_c = tile(channels, min(128, 4096 // block_m))
    with torch.cuda.device_of(features):
        _merge[batch * centres, triton.cdiv(channels, block_c)](
            *tensors,
            parameters.to(wide).contiguous(),
            out,
            *(n, centres, slots, channels, _stride(positions)),
            SIGN=sign,
            WIDE=TYPES[wide],
            BLOCK_M=block_m,
            BLOCK_C=block_c,
            enable_fp_fusion=True,
            num_warps=warps(block_m * block_c),
        )
    return out


def backward(grad, features, scores, positions, kept, neighbors, parameters, sign=1):
    """Gradients of ``forward``: its arguments after ``grad`` (B, K, 4 C), the gradient of its result.

    Returns
    -------
    tuple of tensors
        Gradients of features, scores (None without scores) and parameters, each in its input's dtype.

    Raises
    ------
    ValueError
        More centres or tokens than one launch holds.
    """
    (batch, n, channels), (centres, slots) = features.shape, neighbors.shape[1:]
    check_count(batch * max(centres, n), "tokens")
    check_count(centres * slots, "slots of an image")
    if 0 in (batch, n, channels, centres, slots):
        return tuple(None if x is None else torch.zeros_like(x) for x in (features, scores, parameters))
    wide = wide_type(features, scores)
    grad, packed = grad.contiguous(), parameters.to(wide).contiguous()
    tensors = _contiguous(features, scores, positions, kept, neighbors)
    settings = {"SIGN": sign, "WIDE": TYPES[wide]}
    sizes = n, centres, slots, channels, _stride(positions)
    with torch.cuda.device_of(features):
        grad_features, grad_scores = _backward_tokens(grad, *tensors, packed, sizes, settings)
        grad_parameters = _backward_parameters(grad, *tensors, packed, sizes, settings)
    return grad_features, grad_scores, grad_parameters.to(parameters.dtype)


def _backward_tokens(grad, features, scores, positions, kept, neighbors, parameters, sizes, settings):
    batch, n, channels = features.shape
    grad_features = torch.empty_like(features)
    grad_scores = None if scores is None else torch.empty_like(scores)
    block_c = tile(channels, 128)
    _token_gradients[(batch * n,)](
        *(grad, features, scores, positions, kept, *transpose(neighbors, n), parameters, grad_features, grad_scores),
        *sizes,
        **settings,
        BLOCK_E=ENTRIES,
        BLOCK_C=block_c,
        enable_fp_fusion=True,
        num_warps=warps(ENTRIES * block_c),
    )
    return grad_features, grad_scores


def _backward_parameters(grad, features, scores, positions, kept, neighbors, parameters, sizes, settings):
    """The (8, 4) gradient of the matrix of parameters."""
    (batch, centres, slots), channels = neighbors.shape, features.shape[2]
    block_m = tile(slots, 64)
    block_c = tile(channels, min(128, 4096 // block_m))
    blocks = triton.cdiv(slots, block_m)
    partial = parameters.new_empty(batch * centres * blocks, 8, 4)
    _parameter_gradients[batch * centres, blocks](
        *(grad, features, scores, positions, kept, neighbors, parameters, partial),
        *sizes,
        **settings,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        enable_fp_fusion=True,
        num_warps=warps(block_m * block_c),
    )
    return partial.sum(dim=0)


def _contiguous(*tensors):
    return tuple(x if x is None else x.contiguous() for x in tensors)


def _stride(positions):
    """From one image's positions to the next's: 0 where all share them."""
    return 0 if len(positions) == 1 else positions.shape[1] * 2


def _out_type(features, scores):
    return features.dtype if scores is None else torch.promote_types(features.dtype, scores.dtype)
