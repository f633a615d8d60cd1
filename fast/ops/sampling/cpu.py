"""Launchers of the compiled CPU kernels that read values between tokens (``cpu.cpp``)."""

import torch

from .. import native

SOURCE = "sampling/cpu.cpp"
SUFFIX = {torch.float32: "f32", torch.float64: "f64"}
TABLE_TOKENS = 4  # that a table has for a cell


def forward(sampling_locations, attention, positions, values, nearest, half_power):
    """Read the values of tokens at locations, by Shepard interpolation (paper sec. 4.1).

    Parameters
    ----------
    sampling_locations : (B, q, H, P, 2) tensor
        (x, y) in the unit of the positions; any real or integer dtype.
    attention : (B, q, H, P) floating tensor or None
        None: 1.
    positions : (B or 1, n, 2) int64 tensor
    values : (B, n, H, d) floating tensor
    nearest : (B, q, H, P, k) integer tensor
        Tokens that each location is read from, at least one; negative where there are fewer than k. int32: no copy.
    half_power : (1,) floating tensor
        a, half the power of the distance.

    Returns
    -------
    (B, q, H, d) tensor
        In the dtype of ``values``; computed in float32 or float64.
    """
    return _forward(sampling_locations, attention, positions, values, nearest, None, half_power, (1, 0, 0))


def backward(grad_out, sampling_locations, attention, positions, values, nearest, half_power):
    """Gradients of ``forward``: its arguments after ``grad_out`` (B, q, H, d), the gradient of its result.

    Returns
    -------
    tuple of tensors
        Gradients of sampling_locations (None if they are integers), attention (None without it), values, half_power,
        each in its input's dtype.
    """
    return _backward(grad_out, sampling_locations, attention, positions, values, nearest, None, half_power, (1, 0, 0))


def sample_levels(offsets, logits, tables, positions, values, half_power, grid_size):
    """Let every token read the values of several levels, each location from the four tokens nearest to its cell.

    Rounded half to even and clamped to the grid; the weights use the true location (paper sec. 4.1).

    Parameters
    ----------
    offsets : (B, n, H, L, P, 2) floating tensor
        (x, y), cells: of the locations from the token's own position.
    logits : (B, n, H, L, P) floating tensor
        Attention weights are their softmax over L and P.
    tables : (L, B, h w, 4) int32 tensor
        Of ``deformable.lookup_tables``.
    positions : (B or 1, n, 2) int64 tensor
        Of the tokens of all levels, one level after the other.
    values : (B, n, H, d) floating tensor
    half_power : (1,) floating tensor
    grid_size : (h, w)

    Returns
    -------
    (B, n, H, d) tensor
        In the dtype of ``values``; computed in float32 or float64.
    """
    offsets, logits = offsets.flatten(3, 4), logits.flatten(3, 4)
    return _forward(offsets, logits, positions, values, None, tables, half_power, (len(tables), *grid_size))


def sample_levels_backward(grad_out, offsets, logits, tables, positions, values, half_power, grid_size):
    """Gradients of ``sample_levels``: its arguments after ``grad_out`` (B, n, H, d), the gradient of its result.

    Returns
    -------
    tuple of tensors
        Gradients of offsets, logits, values, half_power, each in its input's dtype.
    """
    inputs = offsets.flatten(3, 4), logits.flatten(3, 4), positions, values, None, tables
    grads = _backward(grad_out, *inputs, half_power, (len(tables), *grid_size))
    return grads[0].view(offsets.shape), grads[1].view(logits.shape), *grads[2:]


def _forward(sampling_locations, attention, positions, values, nearest, tables, half_power, levels):
    arguments = _arguments(sampling_locations, attention, positions, values, nearest, tables, half_power, levels)
    wide, d = arguments[3], values.shape[3]
    out = wide.new_empty(*sampling_locations.shape[:3], d)
    native.call(SOURCE, f"forward_{SUFFIX[wide.dtype]}", *arguments[:6], out, *arguments[6:])
    return out.to(values.dtype)


def _backward(grad_out, sampling_locations, attention, positions, values, nearest, tables, half_power, levels):
    arguments = _arguments(sampling_locations, attention, positions, values, nearest, tables, half_power, levels)
    wide = arguments[3].dtype
    inputs = sampling_locations if sampling_locations.is_floating_point() else None, attention, values, half_power
    grads = [None if x is None else torch.empty(x.shape, dtype=wide) for x in inputs]
    grad_out = grad_out.to(wide).contiguous()
    native.call(SOURCE, f"backward_{SUFFIX[wide]}", grad_out, *arguments[:6], *grads, *arguments[6:])
    return tuple(None if x is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True))


def _arguments(sampling_locations, attention, positions, values, nearest, tables, half_power, levels):
    """The kernels' inputs, contiguous and of one floating dtype, and the numbers after them."""
    floating = [x.dtype for x in (sampling_locations, attention, values) if x is not None and x.is_floating_point()]
    wide = torch.float64 if torch.float64 in floating else torch.float32
    tensors = [
        None if x is None else x.to(wide).contiguous() for x in (sampling_locations, attention, positions, values)
    ]
    tensors += [None if x is None else x.int().contiguous() for x in (nearest, tables)]
    stride = 0 if len(positions) == 1 else 2 * positions.shape[1]
    k = TABLE_TOKENS if nearest is None else nearest.shape[4]
    n, _, d = values.shape[1:]
    return (*tensors, float(half_power), stride, *sampling_locations.shape[:4], k, n, d, *levels)
