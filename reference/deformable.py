"""Multi-scale deformable attention on points (paper sec. 4.1; Zhu et al., Deformable DETR, eq. 3).

Each token looks at a few locations of every level that it chooses itself, and reads the value there by Shepard
interpolation of the level's tokens.
"""

import numpy as np

from .checks import check_arrays, check_sides
from .interpolation import shepard_weights
from .layers import linear, subset
from .neighborhoods import nearest_tokens
from .patch_embedding import grid_positions

NEAREST = 4  # tokens that a value is interpolated from
LOOKUPS = ("rounded", "exact")


def lookup_table(positions, grid_size):
    """Return the nearest 4 tokens of every cell of the grid: positions (n, 2) -> (h w, 4) int64, raster order.

    Sec. 4.1.
    """
    return nearest_tokens(grid_positions(grid_size), positions, NEAREST)


def nearest_by_table(sampling_locations, table, grid_size):
    """Look up the nearest tokens of real-valued locations (..., 2) at the cell they round to: -> (..., 4) int64.

    Sec. 4.1.

    Rounded half to even and clamped to the grid.
    """
    check_sides("grid_size", grid_size)
    h, w = grid_size
    check_arrays(
        sampling_locations=(sampling_locations, "real or whole", "... 2"), table=(table, "whole", f"{h * w} k")
    )  # fmt: skip
    x, y = np.moveaxis(np.rint(sampling_locations).astype(np.int64), -1, 0)
    return table[np.clip(y, 0, h - 1) * w + np.clip(x, 0, w - 1)]


def nearest_exact(sampling_locations, positions):
    """Find the tokens that really are nearest to each location: (..., 2), (n, 2) -> (..., 4), ties in raster order.

    Sec. 4.1.
    """
    check_arrays(sampling_locations=(sampling_locations, "real or whole", "... 2"))
    found = nearest_tokens(sampling_locations.reshape(-1, 2), positions, NEAREST)
    return found.reshape(*sampling_locations.shape[:-1], found.shape[-1])


def deformable_attention(query, positions, source, level_sizes, grid_size, weights, heads, points, lookup="rounded"):
    """Attend to sampled locations of all levels (sec. 4.1; Deformable DETR, eq. 3).

    Parameters
    ----------
    query : (n, D) array
        The tokens of all levels, one level after the other, with their position code added.
    positions : (n, 2) int64 array
    source : (n, D) array
        The same tokens without position code: the values.
    level_sizes : sequence of int
        Tokens of each level; their sum is n.
    grid_size : (h, w)
    weights : dict
        ``sampling_offsets`` [head][level][point][x, y], in cells; ``attention_weights`` [head][level][point];
        ``value``; ``output``; ``shepard_power`` (1,), half the power.
    heads, points : int
    lookup : {"rounded", "exact"}
        How a location's four tokens are found. Their weights always use the true location.

    Returns
    -------
    (n, D) array
    """
    n, levels = len(query), len(level_sizes)
    offsets = linear(query, subset(weights, "sampling_offsets")).reshape(n, heads, levels, points, 2)
    sampling_locations = positions[:, None, None, None] + offsets
    logits = linear(query, subset(weights, "attention_weights")).reshape(n, heads, levels * points)
    attention = np.exp(logits - logits.max(axis=-1, keepdims=True))
    attention = (attention / attention.sum(axis=-1, keepdims=True)).reshape(n, heads, levels, points)
    values = linear(source, subset(weights, "value")).reshape(n, heads, -1)  # (n, H, d)
    out, start = np.zeros_like(values), 0
    for level, size in enumerate(level_sizes):
        tokens = slice(start, start + size)
        sampled = _sample(
            sampling_locations[:, :, level], positions[tokens], values[tokens], grid_size, weights, lookup
        )
        out += np.einsum("nhp,nhpd->nhd", attention[:, :, level], sampled)
        start += size
    return linear(out.reshape(n, -1), subset(weights, "output"))


def _sample(sampling_locations, positions, values, grid_size, weights, lookup):
    """Interpolate one level: locations (q, H, P, 2), positions (n, 2), values (n, H, d) -> (q, H, P, d)."""
    if lookup == "rounded":
        nearest = nearest_by_table(sampling_locations, lookup_table(positions, grid_size), grid_size)
    elif lookup == "exact":
        nearest = nearest_exact(sampling_locations, positions)
    else:
        raise ValueError(f"lookup must be 'rounded' or 'exact', not {lookup!r}")
    weight = shepard_weights(sampling_locations, positions[nearest], weights["shepard_power"])  # (q, H, P, 4)
    head = np.arange(values.shape[1])[:, None, None]
    return np.einsum("qhpk,qhpkd->qhpd", weight, values[nearest, head])
