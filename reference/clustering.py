"""Balanced clustering: tokens sorted along a space-filling curve, cut into runs of equal length (paper sec. 3.1.1).

Everything that decides an order is an integer, or one IEEE division of two integers, so every machine agrees.
"""

import math

import numpy as np

from .checks import FARTHEST, check_arrays, check_indices, check_sides, check_whole, is_whole, shown
from .curves import curve_ranks

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
    """Refuse positions that are not distinct integer cells of the grid.

    Raises
    ------
    TypeError
        Positions that are not integers.
    ValueError
        A shape other than (n, 2) with n >= 1, a token off the grid, two tokens in one cell.
    """
    check_sides("grid_size", grid_size, FARTHEST**2)
    h, w = grid_size
    if not isinstance(positions, np.ndarray):
        raise TypeError(f"positions must be an array, not {shown(type(positions).__name__)}")
    if not np.issubdtype(positions.dtype, np.integer):
        raise TypeError(f"positions must be integers (cells of the finest grid), not {positions.dtype}")
    if positions.ndim != 2 or positions.shape[1] != 2 or len(positions) == 0:
        raise ValueError(f"positions must have shape (n, 2) with n >= 1, not {positions.shape}")
    outside = ((positions < 0) | (positions >= (w, h))).any(axis=1)
    if outside.any():
        first = tuple(positions[outside][0].tolist())
        raise ValueError(f"positions: {outside.sum()} tokens are off the grid h, w = {h}, {w}; the first is at {first}")
    cells, counts = np.unique(positions, axis=0, return_counts=True)
    if (counts > 1).any():
        first = tuple(cells[counts > 1][0].tolist())
        raise ValueError(f"positions: {(counts > 1).sum()} cells hold more than one token; the first is {first}")


def patch_grid(n, cluster_size, grid_size):
    """Return (nh, nw), the patches down and across: square-ish, about one for each of the ceil(n / m) clusters.

    Sec. 3.1.1.
    """
    check_whole("n", n, 1)
    check_cluster_size(cluster_size)
    check_sides("grid_size", grid_size, FARTHEST**2)
    h, w = grid_size
    k = -(-n // cluster_size)
    side = math.sqrt(h * w / k)
    return max(1, round(h / side)), max(1, round(w / side))


def anchor_ratio(positions, ranks, grid_size):
    """Square of Eq. 1: how far each token is along its patch, from the previous anchor to the next.

    Parameters
    ----------
    positions : (n, 2) int64 array
        (x, y) of the tokens.
    ranks : (nh, nw) int64 array
        Rank of each patch along the curve.
    grid_size : (h, w)

    Returns
    -------
    patch_rank : (n,) int64 array
        Rank of the patch that holds the token.
    ratio : (n,) float64 array
        (d_prev / d_next)^2. Anchors and distances are scaled by (2 nw, 2 nh) to be integers; the curve's ends are
        prolonged by a mirror image, and a single patch gives 0.
    """
    check_arrays(positions=(positions, "whole", "n 2"), ranks=(ranks, "whole", "nh+ nw+"))
    check_sides("grid_size", grid_size, FARTHEST**2)
    (h, w), (nh, nw) = grid_size, ranks.shape
    x, y = positions.T
    for axis, places, side in (("x", x, w), ("y", y, h)):
        check_indices(f"{axis} of positions", places, side)
    check_indices("ranks", ranks, nh * nw)
    patch_rank = ranks[y * nh // h, x * nw // w]
    if nh * nw == 1:
        return patch_rank, np.zeros(len(positions))
    iy, ix = np.indices((nh, nw)).reshape(2, -1)
    anchors = np.empty((nh * nw, 2), dtype=np.int64)  # in the curve's order
    anchors[ranks.ravel()] = np.stack([(2 * ix + 1) * w - nw, (2 * iy + 1) * h - nh], axis=1)
    before, after = 2 * anchors[0] - anchors[1], 2 * anchors[-1] - anchors[-2]
    anchors = np.concatenate([[before], anchors, [after]])  # the anchor of rank i is now at i + 1

    def squared_distance(anchor):
        dx, dy = (positions * (2 * nw, 2 * nh) - anchor).T
        return dx**2 * nh**2 + dy**2 * nw**2  # int64

    previous = squared_distance(anchors[patch_rank])
    following = np.maximum(squared_distance(anchors[patch_rank + 2]), 1)
    return patch_rank, previous.astype(np.float64) / following.astype(np.float64)


def balanced_clusters(positions, cluster_size, grid_size, curve="scanline"):
    """Group tokens into clusters of equal size (Fig. 3).

    Tokens are sorted by their patch's rank along the curve, then by ``anchor_ratio``, then in raster order; cluster j
    is the run j m ... j m + m - 1 of that order. Only the last cluster may be shorter.

    Parameters
    ----------
    positions : (n, 2) integer array
        Distinct (x, y), 0 <= x < w, 0 <= y < h, in any storage order.
    cluster_size : int
        m, tokens a cluster.
    grid_size : (h, w)
        Size of the finest grid.
    curve : str
        One of ``curves.CURVES``.

    Returns
    -------
    order : (n,) int64 array
        Indices of the tokens, cluster after cluster.
    cluster : (n,) int64 array
        Number of the cluster that holds each token.

    Raises
    ------
    ValueError, TypeError
        As ``check_positions``, ``patch_grid`` and ``curves.curve_ranks`` say.
    """
    check_positions(positions, grid_size)
    n = len(positions)
    x, y = positions.T
    ranks = curve_ranks(*patch_grid(n, cluster_size, grid_size), curve)
    patch_rank, ratio = anchor_ratio(positions, ranks, grid_size)
    order = np.lexsort((x, y, ratio, patch_rank))  # the last key counts first
    cluster = np.empty(n, dtype=np.int64)
    cluster[order] = np.arange(n) // cluster_size
    return order, cluster


def cluster_sums(positions, order, cluster_size):
    """Return S (k, 2) and c (k,), int64: each cluster's sum of positions and count. Its centre is S / c.

    Sec. 3.1.2.
    """
    check_arrays(positions=(positions, "whole", "n 2"), order=(order, "whole", "n"))
    check_indices("order", order, len(positions))
    check_cluster_size(cluster_size)
    starts = np.arange(0, len(order), cluster_size)
    sums = np.add.reduceat(positions[order], starts, axis=0)
    counts = np.diff(np.append(starts, len(order)))
    return sums, counts
