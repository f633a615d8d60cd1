"""Balanced clustering (paper sec. 3.1.1, Eq. 1), batched. Same results as ``reference.clustering``."""

import math

import torch

from .curves import curve_ranks


def check_positions(positions, canvas):
    """Refuse positions (B, n, 2) that are not distinct integer cells of the canvas (h, w); waits for the device.

    Raises
    ------
    TypeError
        Positions that are not integers.
    ValueError
        Another shape, a token off the canvas, two tokens in one cell.
    """
    h, w = canvas
    if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
        raise TypeError(f"positions must be integers (cells of the finest grid), not {positions.dtype}")
    if positions.ndim != 3 or positions.shape[-1] != 2 or positions.shape[1] == 0:
        raise ValueError(f"positions must have shape (B, n, 2) with n >= 1, not {tuple(positions.shape)}")
    outside = ((positions < 0) | (positions >= positions.new_tensor([w, h]))).any(dim=-1)
    if outside.any():
        first = tuple(positions[outside][0].tolist())
        raise ValueError(
            f"positions: {int(outside.sum())} tokens are off the canvas h, w = {h}, {w}; the first is at {first}"
        )
    cells = (positions[..., 1] * w + positions[..., 0]).sort(dim=1).values
    repeated = cells[:, 1:][cells[:, 1:] == cells[:, :-1]]
    if len(repeated):
        first = (int(repeated[0]) % w, int(repeated[0]) // w)
        raise ValueError(f"positions: {len(repeated.unique())} cells hold more than one token; the first is {first}")


def patch_grid(n, cluster_size, canvas):
    """Return (nh, nw), the patches down and across: square-ish, about one for each of the ceil(n / m) clusters."""
    if cluster_size < 1:
        raise ValueError(f"cluster_size must be at least 1, not {cluster_size}")
    h, w = canvas
    side = math.sqrt(h * w / -(-n // cluster_size))
    return max(1, round(h / side)), max(1, round(w / side))


def anchor_ratio(positions, ranks, canvas):
    """Rank of each token's patch and the square of Eq. 1.

    Parameters
    ----------
    positions : (B, n, 2) int64 tensor
    ranks : (nh, nw) int64 tensor
    canvas : (h, w)

    Returns
    -------
    patch_rank : (B, n) int64 tensor
    ratio : (B, n) float64 tensor
        One division of two exact integers; 0 with a single patch.
    """
    (h, w), (nh, nw) = canvas, ranks.shape
    x, y = positions.unbind(-1)
    patch = (y * nh // h) * nw + x * nw // w
    patch_rank = ranks.flatten()[patch]
    if nh * nw == 1:
        return patch_rank, torch.zeros_like(patch, dtype=torch.float64)
    path = torch.empty_like(ranks.flatten()).scatter_(0, ranks.flatten(), torch.arange(nh * nw, device=ranks.device))
    anchor_x = (2 * (path % nw) + 1) * w - nw  # in the curve's order, scaled by 2 nw
    anchor_y = (2 * (path // nw) + 1) * h - nh
    previous = _squared_distance(positions, _extended(anchor_x)[patch_rank], _extended(anchor_y)[patch_rank], nh, nw)
    after = patch_rank + 2
    following = _squared_distance(positions, _extended(anchor_x)[after], _extended(anchor_y)[after], nh, nw)
    return patch_rank, previous.double() / following.clamp(min=1).double()


def _extended(anchor):
    """Prolong the curve by a mirror image at both ends: the anchor of rank i moves to i + 1."""
    return torch.cat([2 * anchor[:1] - anchor[1:2], anchor, 2 * anchor[-1:] - anchor[-2:-1]])


def _squared_distance(positions, anchor_x, anchor_y, nh, nw):
    dx = (positions[..., 0] * (2 * nw) - anchor_x) * nh
    dy = (positions[..., 1] * (2 * nh) - anchor_y) * nw
    return dx * dx + dy * dy


def balanced_clusters(positions, cluster_size, canvas, curve="scanline"):
    """Group tokens into clusters of equal size (Fig. 3).

    Parameters
    ----------
    positions : (B, n, 2) integer tensor
        Distinct (x, y), 0 <= x < w, 0 <= y < h, in any storage order.
    cluster_size : int
        m, tokens a cluster; only the last cluster may be shorter.
    canvas : (h, w)
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
    check_positions(positions, canvas)
    return cluster_order(positions.long(), cluster_size, canvas, curve)


def cluster_order(positions, cluster_size, canvas, curve="scanline"):
    """``balanced_clusters`` without its checks, so that it never waits for the device."""
    n = positions.shape[1]
    ranks = curve_ranks(*patch_grid(n, cluster_size, canvas), curve, positions.device)
    patch_rank, ratio = anchor_ratio(positions, ranks, canvas)
    order = (positions[..., 1] * canvas[1] + positions[..., 0]).argsort(dim=1)  # the last key first, each sort stable
    order = order.gather(1, ratio.gather(1, order).argsort(dim=1, stable=True))
    order = order.gather(1, patch_rank.gather(1, order).argsort(dim=1, stable=True))
    number = torch.arange(n, device=positions.device) // cluster_size
    cluster = torch.empty_like(order).scatter_(1, order, number.expand_as(order))
    return order, cluster


def cluster_sums(positions, order, cluster_size):
    """Return S (B, k, 2) and c (k,), int64: each cluster's sum of positions and count. Its centre is S / c."""
    n = order.shape[1]
    k = -(-n // cluster_size)
    ordered = positions.gather(1, order[..., None].expand(-1, -1, 2))
    ordered = torch.nn.functional.pad(ordered, (0, 0, 0, k * cluster_size - n))
    sums = ordered.unflatten(1, (k, cluster_size)).sum(dim=2)
    counts = (n - cluster_size * torch.arange(k, device=order.device)).clamp(max=cluster_size)
    return sums, counts
