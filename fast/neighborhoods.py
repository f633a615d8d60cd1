"""Neighbourhoods from clusters (paper sec. 3.1.2), batched. Same results as ``reference.neighborhoods``."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .clustering import cluster_order, cluster_sums
from .ops.attention.clusters_plan import attention_plan, fake_plan
from .ops.indexing import gather_rows
from .ops.nearest.grid import search_on
from .position import relative_position


def nearest_count(neighborhood, cluster_size, k):
    """Return R, the clusters that make a neighbourhood of about ``neighborhood`` tokens: at least 1, at most k."""
    return max(1, min(round(neighborhood / cluster_size), k))


def nearest_clusters(positions, sums, counts, nearest):
    """Find the nearest cluster centres of every token, compared in integers.

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
        Positions so far apart that squared distances would not fit in int64.
    """
    return _nearest_clusters(positions, sums, counts, min(nearest, len(counts)))


@torch.library.custom_op("aff::nearest_clusters", mutates_args=())
def _nearest_clusters(positions: Tensor, sums: Tensor, counts: Tensor, nearest: int) -> Tensor:
    def on_gpu():
        from .ops.nearest import cuda

        return cuda.nearest_clusters(positions, sums, counts, nearest)

    def by(search):
        least_multiple = torch.lcm(counts[0], counts[-1])  # counts are m, ..., m, last
        return search(positions * least_multiple, sums * (least_multiple // counts)[:, None], nearest)[0]

    return search_on(positions.device, nearest, on_gpu, by)


@_nearest_clusters.register_fake
def _(positions, sums, counts, nearest):
    return positions.new_empty(*positions.shape[:2], nearest)


def nearest_tokens(queries, positions, nearest, canvas=None):
    """Find the nearest tokens of each query point.

    Parameters
    ----------
    queries : (B, q, 2) tensor
        (x, y), in the same unit as the positions: int64, or floating point; those are compared in float64.
    positions : (B, n, 2) int64 tensor
    nearest : int
        k; all n tokens if it is more than n.
    canvas : (h, w), optional
        If the positions are cells of it, one sort puts them in raster order instead of two.

    Returns
    -------
    (B, q, k) int64 tensor
        Token indices, nearest first (L2); of two at the same distance the first in raster order comes first.

    Raises
    ------
    ValueError
        Integers so far apart that squared distances would not fit in int64.
    """
    width = None if canvas is None else canvas[1]
    return _nearest_tokens(queries, positions, min(nearest, positions.shape[1]), width)


@torch.library.custom_op("aff::nearest_tokens", mutates_args=())
def _nearest_tokens(queries: Tensor, positions: Tensor, nearest: int, width: int | None) -> Tensor:
    def on_gpu():
        from .ops.nearest import cuda

        return cuda.nearest_tokens(queries, positions, nearest)

    def by(search):
        x, y = positions.unbind(-1)
        if width is None:
            raster = x.argsort(dim=1)
            raster = raster.gather(1, y.gather(1, raster).argsort(dim=1, stable=True))
        else:
            raster = (y * width + x).argsort(dim=1)
        found = search(queries, gather_rows(positions, raster), nearest)[0]
        return raster.gather(1, found.flatten(1)).view_as(found)

    return search_on(positions.device, nearest, on_gpu, by)


@_nearest_tokens.register_fake
def _(queries, positions, nearest, width):
    return positions.new_empty(*queries.shape[:2], nearest)


@dataclass(frozen=True)
class StageGeometry:
    """All that a stage needs to know of where its n tokens are; made once a stage, read by every block and the merge.

    The batch axis has length 1 where all images share their positions (the gridded first stage). A neighbourhood of all
    tokens counts as one cluster of n that sees itself.
    """

    positions: Tensor  # (B, n, 2) int64
    order: Tensor  # (B, n) int64: token indices, cluster after cluster
    cluster: Tensor  # (B, n) int64: the cluster of each token
    members: Tensor  # (B, k, m) int64: token indices of each cluster; -1 where it is short
    place: Tensor  # (B, n) int64: where each token is in the flattened members
    nearest: Tensor  # (B, n, R) int64: clusters that each token sees
    plan: tuple  # tensors that the chosen path of attention wants: attention_plan
    dtype: torch.dtype = torch.float32  # of relative positions
    in_clusters: bool = False  # tokens are numbered cluster after cluster, k m of them, empty places included

    @property
    def neighbors(self):
        """Token indices of each token's neighbourhood, 0 where a slot is empty: (B, n, M) int64."""
        return self._slots.clamp(min=0)

    @property
    def valid(self):
        """False where a slot of ``neighbors`` is empty: (B, n, M) bool."""
        return self._slots >= 0

    @property
    def _slots(self):
        return gather_rows(self.members, self.nearest).flatten(2)  # (B, n, R, m) -> (B, n, M)

    @property
    def relative(self):
        """Relative position of each token's neighbourhood: (B, n, M, 5)."""
        near = gather_rows(self.positions, self.neighbors)
        return relative_position(near - self.positions[:, :, None], self.dtype)

    def neighbors_of(self, tokens):
        """Token indices of the neighbourhoods of some tokens (B, K), -1 where a slot is empty: (B, K, M) int64."""
        members, nearest = (x.expand(len(tokens), -1, -1) for x in (self.members, self.nearest))
        return gather_rows(members, gather_rows(nearest, tokens)).flatten(2)

    def to_clusters(self, x):
        """Put tokens (B, n, ...) in the order of the clusters: (B, k m, ...); empty places repeat a token."""
        members = self.members.flatten(1)
        return gather_rows(x, members.clamp(min=0).expand(len(x), -1))

    def from_clusters(self, x):
        """Put tokens (B, k m, ...) back where they were: (B, n, ...)."""
        return gather_rows(x, self.place.expand(len(x), -1))

    def renumbered(self):
        """The same stage with its tokens numbered as ``to_clusters`` puts them: neighbours lie together in memory."""
        batch, k, m = self.members.shape
        number = torch.arange(k * m, device=self.members.device)
        members, there = torch.where(self.members >= 0, number.view(k, m), -1), number.expand(batch, -1)
        positions, cluster, nearest = (self.to_clusters(x) for x in (self.positions, self.cluster, self.nearest))
        return StageGeometry(positions, there, cluster, members, there, nearest, self.plan, self.dtype, True)


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
    parts = torch.ops.aff.stage_geometry(positions, cluster_size, neighborhood, *canvas, curve, dtype)
    return StageGeometry(positions, *parts[:5], tuple(parts[5:]), dtype)


@torch.library.custom_op("aff::stage_geometry", mutates_args=())
def _stage_geometry(
    positions: Tensor, cluster_size: int, neighborhood: int, h: int, w: int, curve: str, dtype: torch.dtype
) -> list[Tensor]:
    """Return order, cluster, members, place, nearest and the plan: the fields of a StageGeometry."""
    with torch.inference_mode(False):  # so that what was made in inference mode can be kept for training
        order, cluster = cluster_order(positions, cluster_size, (h, w), curve)
        members, place, nearest = _who_sees_whom(positions, order, cluster_size, neighborhood)
        return [order, cluster, members, place, nearest, *attention_plan(positions, members, nearest, dtype)]


def _who_sees_whom(positions, order, cluster_size, neighborhood):
    """Members, place and nearest of a StageGeometry; none shares memory with another or with ``order``."""
    batch, n = order.shape
    token = torch.arange(n, device=order.device).repeat(batch, 1)
    if neighborhood >= n:
        return token[:, None].clone(), token, token.new_zeros(batch, n, 1)
    sums, counts = cluster_sums(positions, order, cluster_size)
    k = len(counts)
    nearest = nearest_clusters(positions, sums, counts, nearest_count(neighborhood, cluster_size, k))
    padded = torch.cat([order, order.new_full((batch, k * cluster_size - n), -1)], dim=1)
    return padded.view(batch, k, cluster_size), torch.empty_like(order).scatter_(1, order, token), nearest


@_stage_geometry.register_fake
def _(positions, cluster_size, neighborhood, h, w, curve, dtype):
    batch, n = positions.shape[:2]
    all_seen = neighborhood >= n
    k, m = (1, n) if all_seen else (-(-n // cluster_size), cluster_size)
    seen = 1 if all_seen else nearest_count(neighborhood, cluster_size, k)
    shapes = (batch, n), (batch, n), (batch, k, m), (batch, n), (batch, n, seen)
    parts = [positions.new_empty(shape) for shape in shapes]
    return [*parts, *fake_plan(positions, parts[2], parts[4], dtype)]
