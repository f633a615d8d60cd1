"""Cluster order (paper sec. 3.1.1, Eq. 1) and choice (sec. 3.3.1, 3.3.2) by sorting: the definition of this side."""

import torch


def anchor_ratio(positions, ranks, grid_size):
    """Rank of each token's patch and the square of Eq. 1.

    Parameters
    ----------
    positions : (B, n, 2) int64 tensor
    ranks : (nh, nw) int64 tensor
    grid_size : (h, w)

    Returns
    -------
    patch_rank : (B, n) int64 tensor
    ratio : (B, n) float64 tensor
        One division of two exact integers; 0 with a single patch.
    """
    (h, w), (nh, nw) = grid_size, ranks.shape
    x, y = positions.unbind(-1)
    patch = (y * nh // h) * nw + x * nw // w
    patch_rank = ranks.flatten()[patch]
    if nh * nw == 1:
        return patch_rank, torch.zeros_like(patch, dtype=torch.float64)
    path = ranks.flatten().scatter(0, ranks.flatten(), torch.arange(nh * nw, device=ranks.device))
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


def cluster_sums(positions, order, cluster_size):
    """Return S (B, k, 2) and c (k,), int64: each cluster's sum of positions and count. Its centre is S / c."""
    n = order.shape[1]
    k = -(-n // cluster_size)
    ordered = positions.gather(1, order[..., None].expand(-1, -1, 2))
    ordered = torch.nn.functional.pad(ordered, (0, 0, 0, k * cluster_size - n))
    sums = ordered.unflatten(1, (k, cluster_size)).sum(dim=2)
    counts = (n - cluster_size * torch.arange(k, device=order.device)).clamp(max=cluster_size)
    return sums, counts


def cluster_tokens(positions, ranks, cluster_size, grid_size):
    """Cut the tokens, in the order of Eq. 1, into clusters: order, cluster, place, members and sums of ``Clusters``."""
    (batch, n), k = positions.shape[:2], -(-positions.shape[1] // cluster_size)
    patch_rank, ratio = anchor_ratio(positions, ranks, grid_size)
    order = (positions[..., 1] * grid_size[1] + positions[..., 0]).argsort(
        dim=1
    )  # the last key first, each sort stable
    order = order.gather(1, ratio.gather(1, order).argsort(dim=1, stable=True))
    order = order.gather(1, patch_rank.gather(1, order).argsort(dim=1, stable=True))
    token = torch.arange(n, device=positions.device)
    cluster = order.scatter(1, order, (token // cluster_size).expand_as(order))
    place = order.scatter(1, order, token.expand_as(order))
    members = torch.cat([order, order.new_full((batch, k * cluster_size - n), -1)], dim=1).view(batch, k, cluster_size)
    return order, cluster, place, members, cluster_sums(positions, order, cluster_size)[0]


def choose(value, keep):
    """Indices (B, K), ascending, of the ``keep`` largest values (B, n); of equal ones the first."""
    best_first = value.sort(dim=1, descending=True, stable=True).indices
    return best_first[:, :keep].sort(dim=1).values
