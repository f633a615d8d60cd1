"""Neighbourhoods from clusters (paper sec. 3.1.2), batched. Same results as ``reference.neighborhoods``."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .clustering import cluster_order, cluster_sums
from .position import relative_position

PAIRS_AT_ONCE = 1 << 22  # distances held at a time, so that memory does not grow with the square of the image
LARGEST = 2**63 - 1


def nearest_count(neighborhood, cluster_size, k):
    """Return R, the clusters that make a neighbourhood of about ``neighborhood`` tokens: at least 1, at most k."""
    return max(1, min(round(neighborhood / cluster_size), k))


def nearest_clusters(positions, sums, counts, nearest):
    """Find the nearest cluster centres of every token, by comparing all of them in integers.

    Parameters
    ----------
    positions : (B, n, 2) int64 tensor
    sums, counts : (B, k, 2) and (k,) int64 tensors
        S and c of each cluster; its centre is S / c. All counts but the last are equal.
    nearest : int
        R; all k clusters if it is more than k.

    Returns
    -------
    (B, n, R) int64 tensor
        Cluster numbers, nearest first; of two at the same distance the lower number comes first.

    Raises
    ------
    ValueError
        Positions so large that squared distances would not fit in int64.
    """
    least_multiple = torch.lcm(counts[0], counts[-1])  # counts are m, ..., m, last
    scaled_sums = sums * (least_multiple // counts)[:, None]
    return _nearest(positions * least_multiple, scaled_sums, nearest)


def nearest_tokens(queries, positions, nearest, canvas=None):
    """Find the nearest tokens of each query point.

    Parameters
    ----------
    queries : (B, q, 2) tensor
        (x, y), in the same unit as the positions. Integers, or real numbers without a canvas.
    positions : (B, n, 2) int64 tensor
    nearest : int
        k; all n tokens if it is more than n.
    canvas : (h, w), optional
        If queries and positions are cells of it, only the surroundings of each query are searched, ring by ring,
        instead of all tokens; the result is the same.

    Returns
    -------
    (B, q, k) int64 tensor
        Token indices, nearest first (L2); of two at the same distance the first in raster order comes first.
    """
    if canvas is not None and positions.shape[1] ** 2 > 4 * nearest * canvas[0] * canvas[1]:  # else there are few
        return _nearest_on_canvas(queries, positions, nearest, canvas)
    by_x = positions[..., 0].argsort(dim=1)
    raster = by_x.gather(1, positions[..., 1].gather(1, by_x).argsort(dim=1, stable=True))
    ordered = positions.gather(1, raster[..., None].expand(-1, -1, 2))
    found = (_nearest_real if queries.is_floating_point() else _nearest)(queries, ordered, nearest)
    return raster.gather(1, found.flatten(1)).view_as(found)


def _nearest_on_canvas(queries, positions, nearest, canvas):
    """Look at the cells around each query in the order of (distance, dy, dx), which is that of the tie rule."""
    (h, w), (batch, q), n = canvas, queries.shape[:2], positions.shape[1]
    table = positions.new_full((batch * h * w,), -1)
    image = torch.arange(batch, device=positions.device)[:, None]
    table[((image * h + positions[..., 1]) * w + positions[..., 0]).flatten()] = torch.arange(
        n, device=positions.device
    ).repeat(batch)
    found = positions.new_empty(batch * q, min(nearest, n))
    points = torch.cat([queries, image.expand(-1, q)[..., None]], dim=-1).flatten(0, 1)  # (B q, 3): x, y, image
    waiting, radius = torch.arange(batch * q, device=points.device), 2
    while len(waiting):
        ring = _disc(radius, points.device)
        left = []
        for some in waiting.split(max(1, PAIRS_AT_ONCE // len(ring))):
            x, y = points[some, 0, None] + ring[:, 0], points[some, 1, None] + ring[:, 1]
            inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
            token = torch.where(
                inside, table[(points[some, 2, None] * h + y.clamp(0, h - 1)) * w + x.clamp(0, w - 1)], -1
            )
            place = torch.where(token >= 0, torch.arange(len(ring), device=x.device), len(ring))
            first = place.topk(found.shape[1], dim=1, largest=False).values
            enough = first[:, -1] < len(ring)
            found[some[enough]] = token[enough].gather(1, first[enough])
            left.append(some[~enough])
        waiting, radius = torch.cat(left), 2 * radius
    return found.view(batch, q, -1)


def _disc(radius, device):
    """All (dx, dy) with dx^2 + dy^2 <= radius^2, by distance, then dy, then dx."""
    side = torch.arange(-radius, radius + 1, device=device)
    dy, dx = (v.flatten() for v in torch.meshgrid(side, side, indexing="ij"))
    squared = dx * dx + dy * dy
    order = squared.argsort(stable=True)
    return torch.stack([dx, dy], dim=1)[order[squared[order] <= radius * radius]]


def _nearest_real(points, centers, nearest):
    """``_nearest`` for real-valued points: distances in float64, the lower index on a tie."""
    rows = max(1, PAIRS_AT_ONCE // max(1, len(points) * centers.shape[1]))
    centers = centers.double()
    parts = []
    for part in points.double().split(rows, dim=1):
        squared = (part[:, :, None] - centers[:, None]).square().sum(dim=-1)
        parts.append(squared.sort(dim=-1, stable=True).indices[..., :nearest])
    return torch.cat(parts, dim=1)


def _nearest(points, centers, nearest):
    """Indices (B, n, nearest) of the centres (B, k, 2) nearest to each point (B, n, 2), the lower index on a tie."""
    batch, n, k = len(points), points.shape[1], centers.shape[1]
    number = torch.arange(k, device=points.device)
    result = points.new_empty(batch, n, min(nearest, k))
    if batch == 0:
        return result
    span = torch.stack([points.amax(), centers.amax()]).amax() - torch.stack([points.amin(), centers.amin()]).amin()
    if 2 * int(span) ** 2 * k + k > LARGEST:
        raise ValueError(
            f"{k} centres over {int(span)} units are too many for exact integer distances; use a smaller image"
        )
    rows = max(1, PAIRS_AT_ONCE // max(1, batch * k))
    for start in range(0, n, rows):
        part = points[:, start : start + rows, None]  # (B, rows, 1, 2)
        dx, dy = part[..., 0] - centers[:, None, :, 0], part[..., 1] - centers[:, None, :, 1]
        key = dx.square_().add_(dy.square_()).mul_(k).add_(number)  # one integer holds the distance and the tie's rule
        result[:, start : start + rows] = key.topk(result.shape[2], dim=-1, largest=False).indices
    return result


@dataclass(frozen=True)
class StageGeometry:
    """All that a stage needs to know of where its n tokens are; made once a stage, read by every block and the merge.

    The batch axis has length 1 where all images share their positions (the gridded first stage). Attention works
    cluster by cluster: the tokens of one cluster see nearly the same clusters, so the union of those is gathered once
    for all of them. A neighbourhood of all tokens counts as one cluster of n that sees itself.
    """

    positions: Tensor  # (B, n, 2) int64
    order: Tensor  # (B, n) int64: token indices, cluster after cluster
    cluster: Tensor  # (B, n) int64: the cluster of each token
    neighbors: Tensor  # (B, n, M) int64: token indices of each token's neighbourhood; 0 where a slot is empty
    valid: Tensor | None  # (B, n, M) bool: False where a slot is empty; None: none is
    members: Tensor  # (B, k, m) int64: token indices of each cluster; 0 where it is short
    place: Tensor  # (B, n) int64: where each token is in the flattened members
    union: Tensor  # (B, k, U) int64: clusters that any token of a cluster sees; 0 where there are fewer than U
    seen: Tensor  # (B, k, m, U m) bool: which tokens of its cluster's union each token sees
    between: Tensor  # (B, k, m, U m, 5) float: relative_position of the tokens of the union seen from each token

    @property
    def relative(self):
        """Relative position of each token's neighbourhood: (B, n, M, 5)."""
        batch, n = self.positions.shape[:2]
        return self.relative_of(torch.arange(n, device=self.positions.device).expand(batch, -1))

    def relative_of(self, tokens):
        """Relative position of the neighbourhoods of some tokens (B, K), in the dtype of ``between``: (B, K, M, 5)."""
        positions, neighbors = (x.expand(len(tokens), -1, -1) for x in (self.positions, self.neighbors))
        near = gather_rows(positions, gather_rows(neighbors, tokens))
        return relative_position(near - gather_rows(positions, tokens)[:, :, None], self.between.dtype)


def stage_geometry(positions, cluster_size, neighborhood, canvas, curve="scanline", dtype=torch.float32):
    """Cluster the tokens and list the neighbourhood of each.

    Parameters
    ----------
    positions : (B, n, 2) int64 tensor
        Distinct cells of the canvas; not checked here.
    cluster_size : int
        m.
    neighborhood : int
        Wanted size of a neighbourhood, tokens. If it is n or more, every token sees all n.
    canvas : (h, w)
    curve : str
    dtype : torch.dtype
        Of relative positions.

    Returns
    -------
    StageGeometry
        With M = R m slots, or M = n where all tokens are seen.
    """
    batch, n = positions.shape[:2]
    order, cluster = cluster_order(positions, cluster_size, canvas, curve)
    token = torch.arange(n, device=positions.device)
    if neighborhood >= n:
        neighbors, members, place = token.expand(batch, n, n), token.expand(batch, 1, n), token.expand(batch, n)
        union = members.new_zeros(batch, 1, 1)
        valid, seen = None, torch.ones_like(neighbors[:, None], dtype=torch.bool)
    else:
        sums, counts = cluster_sums(positions, order, cluster_size)
        k = len(counts)
        nearest = nearest_clusters(positions, sums, counts, nearest_count(neighborhood, cluster_size, k))
        members = torch.nn.functional.pad(order, (0, k * cluster_size - n), value=-1).unflatten(1, (k, cluster_size))
        neighbors = gather_rows(members, nearest).flatten(2)  # (B, n, R, m) -> (B, n, M)
        valid = neighbors >= 0 if n % cluster_size else None
        union, seen = _union(members, nearest)
        members, neighbors = members.clamp(min=0), neighbors.clamp(min=0)
        place = torch.empty_like(order).scatter_(1, order, token.expand(batch, -1))
    sources = gather_rows(members, union).flatten(2)  # (B, k, U m)
    offsets = gather_rows(positions, sources)[:, :, None] - gather_rows(positions, members)[:, :, :, None]
    between = relative_position(offsets, dtype)
    return StageGeometry(positions, order, cluster, neighbors, valid, members, place, union, seen, between)


def _union(members, nearest):
    """Clusters that each cluster's tokens see, and which of them each token sees.

    members (B, k, m) with -1 in empty places, nearest (B, n, R) -> union (B, k, U), seen (B, k, m, U m).
    """
    k, m = members.shape[1:]
    near = torch.where(members[..., None] >= 0, gather_rows(nearest, members.clamp(min=0)), k)  # (B, k, m, R)
    ascending = near.flatten(2).sort(dim=2).values
    first = ascending.diff(dim=2, prepend=ascending.new_full((1, 1, 1), -1).expand(*ascending.shape[:2], 1)) > 0
    first &= ascending < k
    column = first.cumsum(dim=2) - 1
    width = int(column.max()) + 1 if len(column) else 1
    union = ascending.new_full((*ascending.shape[:2], width + 1), k)
    union = union.scatter_(2, torch.where(first, column, width), torch.where(first, ascending, k))[..., :width]
    sees = (near[..., None] == union[:, :, None, None]).any(dim=3) & (union < k)[:, :, None]  # (B, k, m, U)
    union = union.clamp(max=k - 1)
    there = gather_rows(members, union).flatten(2) >= 0  # (B, k, U m)
    return union, sees.repeat_interleave(m, dim=3) & there[:, :, None]


def gather_rows(x, index, batch_axis=0):
    """Pick rows of x (..., B, n, ...) by index (B, ...): -> (..., *index.shape, ...).

    ``batch_axis`` is where x has its batch; the axis after it is picked from.
    """
    start = x.shape[batch_axis + 1] * torch.arange(len(index), device=x.device)
    flat = (index + start.view(-1, *[1] * (index.ndim - 1))).flatten()
    picked = x.flatten(batch_axis, batch_axis + 1).index_select(batch_axis, flat)
    return picked.unflatten(batch_axis, index.shape)


def token_slices(neighbors, channels):
    """Cut the tokens of neighbors (B, n, M) into slices whose gathered neighbourhoods are small.

    A token gathers M x ``channels`` numbers. On a CPU a slice fits its cache, which makes gathering several times as
    fast; elsewhere it only bounds memory.
    """
    n, slots = neighbors.shape[1:]
    elements = 1 << 20 if neighbors.device.type == "cpu" else 1 << 28
    rows = max(1, elements // max(1, slots * channels))
    return [slice(start, start + rows) for start in range(0, n, rows)]
