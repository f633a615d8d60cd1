"""Balanced clustering (paper sec. 3.1.1, Eq. 1), batched. Same results as ``reference.clustering``."""

import math

import torch

from . import ops
from .checks import FARTHEST, check_arrays, check_indices, check_sides, check_whole, is_whole, shown
from .curves import curve_ranks
from .ops.ordering.plain import anchor_ratio, cluster_sums

__all__ = [
    "anchor_ratio",
    "balanced_clusters",
    "check_positions",
    "cluster_order",
    "cluster_sums",
    "cluster_tokens",
    "patch_grid",
]

LARGEST_CLUSTER = 2**16  # tokens; the last cluster is filled up to this size


def check_cluster_size(cluster_size):
    """Refuse what is no whole number from 1 to ``LARGEST_CLUSTER``."""
    if not is_whole(cluster_size):
        raise TypeError(f"cluster_size must be a whole number, not {shown(cluster_size)}")
    if cluster_size < 1:
        raise ValueError(f"cluster_size must be at least 1, not {shown(cluster_size)}")
    if cluster_size > LARGEST_CLUSTER:
        raise ValueError(f"cluster_size must be at most {LARGEST_CLUSTER}, not {shown(cluster_size)}")


def check_positions(positions, grid_size):
    """Refuse positions (B, n, 2) that are not distinct integer cells of the grid (h, w); waits for the device.

    Raises
    ------
    TypeError
        Positions that are not integers.
    ValueError
        Another shape, a token off the grid, two tokens in one cell.
    """
    check_sides("grid_size", grid_size, FARTHEST**2)
    h, w = grid_size
    if not isinstance(positions, torch.Tensor) or positions.layout != torch.strided:
        raise TypeError(f"positions must be a dense tensor, not {shown(type(positions).__name__)}")
    if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
        raise TypeError(f"positions must be integers (cells of the finest grid), not {positions.dtype}")
    if positions.ndim != 3 or positions.shape[-1] != 2 or positions.shape[1] == 0:
        raise ValueError(f"positions must have shape (B, n, 2) with n >= 1, not {tuple(positions.shape)}")
    outside = ((positions < 0) | (positions >= positions.new_tensor([w, h]))).any(dim=-1)
    if outside.any():
        first = tuple(positions[outside][0].tolist())
        raise ValueError(
            f"positions: {int(outside.sum())} tokens are off the grid h, w = {h}, {w}; the first is at {first}"
        )
    cells = (positions[..., 1] * w + positions[..., 0]).sort(dim=1).values
    repeated = cells[:, 1:][cells[:, 1:] == cells[:, :-1]]
    if len(repeated):
        first = (int(repeated[0]) % w, int(repeated[0]) // w)
        raise ValueError(f"positions: {len(repeated.unique())} cells hold more than one token; the first is {first}")


def patch_grid(n, cluster_size, grid_size):
    """Return (nh, nw), the patches down and across: square-ish, about one for each of the ceil(n / m) clusters."""
    check_whole("n", n, 1)
    check_cluster_size(cluster_size)
    check_sides("grid_size", grid_size, FARTHEST**2)
    h, w = grid_size
    side = math.sqrt(h * w / -(-n // cluster_size))
    return max(1, round(h / side)), max(1, round(w / side))


def balanced_clusters(positions, cluster_size, grid_size, curve="scanline"):
    """Group tokens into clusters of equal size (Fig. 3).

    Parameters
    ----------
    positions : (B, n, 2) integer tensor
        Distinct (x, y), 0 <= x < w, 0 <= y < h, in any storage order.
    cluster_size : int
        m, tokens a cluster; only the last cluster may be shorter.
    grid_size : (h, w)
    curve : str
        One of ``curves.CURVES``.

    Returns
    -------
    order : (B, n) int64 tensor
        Indices of the tokens, cluster after cluster.
    cluster : (B, n) int64 tensor
        Number of the cluster that holds each token.

    Raises
    ------
    ValueError, TypeError
        As ``check_positions``, ``patch_grid`` and ``curves.curve_ranks`` say.
    """
    check_positions(positions, grid_size)
    return cluster_order(positions.long(), cluster_size, grid_size, curve)


def cluster_order(positions, cluster_size, grid_size, curve="scanline"):
    """``balanced_clusters`` without checks that wait for a device: on a GPU positions must be right."""
    return cluster_tokens(positions, cluster_size, grid_size, curve)[:2]


def cluster_tokens(positions, cluster_size, grid_size, curve="scanline"):
    """All that ``ops.ordering.Clusters`` holds, of positions (B, n, 2) int64, as ``cluster_order``."""
    check_arrays(positions=(positions, "whole", "B n 2"))
    check_sides("grid_size", grid_size, FARTHEST**2)
    for axis, side in zip("xy", reversed(grid_size), strict=True):  # a compiled kernel looks the cells up
        check_indices(f"{axis} of positions", positions[..., "xy".index(axis)], side)
    ranks = curve_ranks(*patch_grid(positions.shape[1], cluster_size, grid_size), curve, positions.device)
    return ops.cluster_tokens(positions.long(), ranks, cluster_size, grid_size)
