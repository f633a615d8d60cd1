"""Shepard interpolation and sampled reading of tokens (paper sec. 4.1): eager PyTorch, the definition of this side."""

import torch

from ..indexing import gather_rows, recomputed, token_slices, weighted_sum

HALF_POWER = 3.0  # a = power / 2 with the power 6 of the paper
FLOOR = 1e-11  # added to (d^2)^a, so that a token's own place is no division by zero


def shepard_weights(points, neighbors, half_power=HALF_POWER):
    """Compute the weights of the neighbours of each point, in at least float32.

    Parameters
    ----------
    points : (..., 2) tensor
        Where a value is wanted, (x, y), cells.
    neighbors : (..., k, 2) tensor
        Positions of the k tokens used for it.
    half_power : float or (1,) tensor
        a, half the power of the distance; may be learnt.

    Returns
    -------
    (..., k) tensor
        w = u / sum u with u = 1 / ((d^2)^a + 1e-11).
    """
    u = _inverse_powers(points, neighbors, half_power)
    return u / u.sum(dim=-1, keepdim=True)


def _inverse_powers(points, neighbors, half_power):
    wide = torch.promote_types(points.dtype, torch.float32) if points.is_floating_point() else torch.float32
    squared = (neighbors.to(wide) - points.to(wide)[..., None, :]).square().sum(dim=-1)
    on_token = squared == 0  # kept out of the power, whose gradient at 0 is not finite once a < 1
    return 1 / ((squared.masked_fill(on_token, 1) ** half_power).masked_fill(on_token, 0) + FLOOR)


def nearest_by_table(sampling_locations, table, grid_size):
    """Look up the nearest tokens of locations (B, q, P, 2) at the cell they round to: -> (B, q, P, 4) int64.

    Rounded half to even and clamped to the grid.
    """
    h, w = grid_size
    x, y = sampling_locations.detach().round().long().unbind(-1)
    return gather_rows(table, y.clamp(0, h - 1) * w + x.clamp(0, w - 1))


def sample(sampling_locations, attention, positions, values, nearest, half_power):
    """``ops.sample``: same arguments, same result."""
    batch, queries, heads, points, _ = nearest.shape
    positions, values = positions.expand(batch, -1, -1), values.transpose(1, 2)  # (B, H, n, d)
    tokens, head = values.shape[2], torch.arange(heads, device=values.device)[:, None, None]

    def read(sampling_locations, attention, values, half_power, nearest):  # rows of queries
        missing, near = nearest < 0, nearest.clamp(min=0).long()
        u = _inverse_powers(sampling_locations, gather_rows(positions, near), half_power).masked_fill(missing, 0)
        weight = u / u.sum(dim=-1, keepdim=True)  # (B, rows, H, P, k)
        weight = weight if attention is None else weight * attention[..., None]
        rows = gather_rows(values.flatten(1, 2), near + head * tokens).to(weight.dtype)  # (B, rows, H, P, k, d)
        return weighted_sum(weight.flatten(3), rows.flatten(3, 4)).to(values.dtype)

    slots = torch.empty(1, queries, heads * points * nearest.shape[4], device="meta")
    out = []
    for part in token_slices(slots, batch * values.shape[3]):
        weights = None if attention is None else attention[:, part]
        out.append(recomputed(read, sampling_locations[:, part], weights, values, half_power, nearest[:, part]))
    return torch.cat(out, dim=1)


def nearest_of_levels(sampling_locations, tables, grid_size):
    """Tokens that locations (B, q, H, L, P, 2) of all levels are read from: (B, q, H, L, P, 4) int32.

    By ``tables`` (L, B, h w, 4), as ``ops.sample_levels`` takes them.
    """
    found = []
    for level, table in enumerate(tables):
        on_level = sampling_locations[:, :, :, level]
        found.append(nearest_by_table(on_level.flatten(2, 3), table, grid_size).unflatten(2, on_level.shape[2:4]))
    return torch.stack(found, dim=3)
