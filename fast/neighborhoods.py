"""Neighbourhoods from clusters (paper sec. 3.1.2), batched. Same results as ``reference.neighborhoods``."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import FARTHEST, check_arrays, check_choice, check_sides, check_whole, shown
from .clustering import check_cluster_size, cluster_tokens
from .curves import CURVES
from .ops import dispatch, nearest_clusters, nearest_tokens
from .ops.attention import Plan, fake_plan, make_plan
from .ops.indexing import gather_rows
from .position import relative_position

__all__ = ["StageGeometry", "nearest_clusters", "nearest_count", "nearest_tokens", "stage_geometry"]


def nearest_count(neighborhood, cluster_size, k):
    """Return R, the clusters that make a neighbourhood of about ``neighborhood`` tokens: at least 1, at most k."""
    check_whole("neighborhood", neighborhood, 1)
    check_cluster_size(cluster_size)
    check_whole("k", k, 1)
    return max(1, min(round(neighborhood / cluster_size), k))


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
    plan: Plan  # what the path of attention wants to know of all that
    dtype: torch.dtype = torch.float32  # of relative positions
    in_clusters: bool = False  # tokens are numbered cluster after cluster, k m of them, empty places included

    @property
    def current(self):
        """Whether the plan is for the path that attention takes now."""
        return self.plan.path == dispatch.path("attention", self.positions.device)

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
        members, nearest = (x.expand(tokens.shape[0], -1, -1) for x in (self.members, self.nearest))
        return gather_rows(members, gather_rows(nearest, tokens)).flatten(2)

    def to_clusters(self, x):
        """Return tokens (B, n, ...) in the order of the clusters: (B, k m, ...); empty places repeat a token."""
        members = self.members.flatten(1)
        return gather_rows(x, members.clamp(min=0).expand(x.shape[0], -1))

    def from_clusters(self, x):
        """Return tokens (B, k m, ...) in their own order again: (B, n, ...)."""
        return gather_rows(x, self.place.expand(x.shape[0], -1))

    def renumbered(self):
        """The same stage with its tokens numbered as ``to_clusters`` puts them: neighbours lie together in memory."""
        batch, k, m = self.members.shape
        number = torch.arange(k * m, device=self.members.device)
        members, there = torch.where(self.members >= 0, number.view(k, m), -1), number.expand(batch, -1)
        positions, cluster, nearest = (self.to_clusters(x) for x in (self.positions, self.cluster, self.nearest))
        return StageGeometry(positions, there, cluster, members, there, nearest, self.plan, self.dtype, True)


def stage_geometry(positions, cluster_size, neighborhood, grid_size, curve="scanline", dtype=torch.float32):
    """Cluster the tokens and list the neighbourhood of each.

    Parameters
    ----------
    positions : (B, n, 2) integer tensor
        Distinct cells of the grid; not checked here.
    cluster_size : int
        m.
    neighborhood : int
        Wanted size of a neighbourhood, tokens. If it is n or more, every token sees all n.
    grid_size : (h, w)
    curve : str
    dtype : torch.dtype
        Of relative positions.

    Returns
    -------
    StageGeometry
        With M = R m slots, or M = n where all tokens are seen.
    """
    check_arrays(positions=(positions, "whole", "B n 2"))
    positions = positions.long()
    check_cluster_size(cluster_size)
    check_whole("neighborhood", neighborhood, 1)
    check_sides("grid_size", grid_size, FARTHEST**2)
    check_choice("curve", curve, CURVES)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a dtype of real numbers, not {shown(dtype)}")
    path = dispatch.path("attention", positions.device)
    parts = torch.ops.aff.stage_geometry(positions, cluster_size, neighborhood, *grid_size, curve, dtype, path)
    return StageGeometry(positions, *parts[:5], Plan(path, tuple(parts[5:])), dtype)


@torch.library.custom_op("aff::stage_geometry", mutates_args=())
def _stage_geometry(
    positions: Tensor, cluster_size: int, neighborhood: int, h: int, w: int, curve: str, dtype: torch.dtype, path: str
) -> list[Tensor]:
    """Return order, cluster, members, place and nearest, as in a StageGeometry, and the tensors of the path's plan."""
    with torch.inference_mode(False):  # so that what was made in inference mode can be kept for training
        clusters = cluster_tokens(positions, cluster_size, (h, w), curve)
        members, place, nearest = _who_sees_whom(positions, clusters, cluster_size, neighborhood)
        parts = [clusters.order, clusters.cluster, members, place, nearest]
        return [*parts, *make_plan(path, positions, members, nearest, dtype)]


def _who_sees_whom(positions, clusters, cluster_size, neighborhood):
    """Members, place and nearest of a StageGeometry."""
    batch, n = clusters.order.shape
    if neighborhood >= n:
        token = torch.arange(n, device=positions.device).repeat(batch, 1)
        return token[:, None].clone(), token, token.new_zeros(batch, n, 1)
    k = clusters.sums.shape[1]
    counts = (n - cluster_size * torch.arange(k, device=positions.device)).clamp(max=cluster_size)
    nearest = nearest_count(neighborhood, cluster_size, k)
    return clusters.members, clusters.place, nearest_clusters(positions, clusters.sums, counts, nearest)


@_stage_geometry.register_fake
def _(positions, cluster_size, neighborhood, h, w, curve, dtype, path):
    batch, n = positions.shape[:2]
    all_visible = neighborhood >= n
    k, m = (1, n) if all_visible else (-(-n // cluster_size), cluster_size)
    nearest = 1 if all_visible else nearest_count(neighborhood, cluster_size, k)
    shapes = (batch, n), (batch, n), (batch, k, m), (batch, n), (batch, n, nearest)
    parts = [positions.new_empty(shape) for shape in shapes]
    return [*parts, *fake_plan(path, positions, parts[2], parts[4], dtype)]
