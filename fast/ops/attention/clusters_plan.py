"""What attention by dense products wants to know of a stage's clusters (paper sec. 3.1.2, 3.2)."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ...position import position_terms
from ..indexing import gather_rows

PAIRS_AT_ONCE = 1 << 16
FEATURES = 6  # dx, dy, distance, sine, cosine, mask
GROUPS, LEAST = 5, 16  # of clusters whose unions are about as wide; clusters in a group, unless they run out


class Plan(NamedTuple):
    """What clusters see: sorted by how many they see, cut into groups, each padded to the widest of its own."""

    which: Tensor  # (G,) int64, G = B k: the clusters, those that see most first; group after group
    union: Tensor  # (G, U) int64: clusters that any token of each of `which` sees, ascending, filled up with any
    features: tuple  # `GROUPS` tensors (6, g, m, S): each token of the union seen from each token of the cluster


def plan_of(tensors):
    """Return the Plan made of the list of its tensors."""
    which, union, *features = tensors
    return Plan(which, union, tuple(features))


def fake_plan(positions, members, dtype):
    """Tensors like those of ``make_plan``, without values, for torch.compile; a union's size is not known then."""
    (batch, k, m), new_size = members.shape, torch.library.get_ctx().new_dynamic_size
    rows = [part.stop - part.start for part in _groups(batch * k)]
    widths = [0 if r == 0 else 1 if k == 1 else new_size() for r in rows]
    sizes = [(FEATURES, r, m, width * m) for r, width in zip(rows, widths, strict=True)]
    union = positions.new_empty(batch * k, widths[0] if batch else 1)
    return [positions.new_empty(batch * k), union, *(positions.new_empty(size, dtype=dtype) for size in sizes)]


def make_plan(positions, members, nearest, dtype=torch.float32):
    """Compute the tensors of a Plan; made once a stage, read by each of its blocks.

    Parameters
    ----------
    positions : (B, n, 2) int64 tensor
    members : (B, k, m) int64 tensor
        Token indices of each cluster, -1 in empty places.
    nearest : (B, n, R) int64 tensor
        Clusters that each token sees.
    dtype : torch.dtype
        Of the features.
    """
    batch, k, m = members.shape
    union, sees = cluster_unions(members, nearest)
    width, which = (union < k).sum(dim=2).flatten().sort(descending=True, stable=True)
    union = (union.clamp(max=k - 1) + k * torch.arange(batch, device=union.device)[:, None, None]).flatten(0, 1)[which]
    hidden = _minus_infinity(~sees, dtype).flatten(0, 1)[which]
    x, y = gather_rows(positions, members.clamp(min=0)).flatten(0, 1).to(dtype).unbind(-1)  # (G, m)
    located = torch.stack([x, y, _minus_infinity(members < 0, dtype).flatten(0, 1)])
    groups = _groups(batch * k)
    widest = iter(width[[part.start for part in groups if part.start < len(width)]].tolist())
    features = []
    for part in groups:
        seen = slice(0, next(widest) if part.start < len(width) else 0)
        features.append(_features(located, which[part], union[part, seen], hidden[part, :, seen]))
    return [which, union, *features]


def _groups(clusters):
    """Cut the clusters into ``GROUPS`` slices; the last ones are empty where there are few."""
    rows = max(LEAST, -(-clusters // GROUPS))
    starts = [min(clusters, i * rows) for i in range(GROUPS + 1)]
    return [slice(*ends) for ends in pairwise(starts)]


def _features(located, which, union, hidden):
    """Features of a group, (6, g, m, u m), made in slices that fit a cache.

    located (3, G, m): x and y of each cluster's tokens, and minus infinity where there is none, else 0. which (g,),
    union (g, u): the group's clusters and those that they see. hidden (g, m, u): minus infinity where a token does not
    see one of those, else 0.
    """
    (clusters, u), m = union.shape, located.shape[2]
    features = located.new_empty(FEATURES, clusters, m, u * m)
    rows = max(1, PAIRS_AT_ONCE // (m * m * max(1, u)))
    for part in (slice(start, start + rows) for start in range(0, clusters, rows)):
        x, y, absent = located.index_select(1, union[part].flatten()).view(3, -1, 1, u * m)
        own_x, own_y, _ = located.index_select(1, which[part])[..., None]
        mask = (hidden[part, ..., None] + absent.unflatten(2, (u, m))).flatten(2)
        for values, term in zip(features[:, part], (*position_terms(x - own_x, y - own_y), mask), strict=True):
            values.copy_(term)
    return features


def _minus_infinity(where, dtype):
    """Minus infinity where a condition holds, else 0."""
    return torch.zeros_like(where, dtype=dtype).masked_fill_(where, -torch.inf)


def cluster_unions(members, nearest):
    """Clusters that each cluster's tokens see, and which of them each token sees.

    members (B, k, m) with -1 in empty places, nearest (B, n, R) -> union (B, k, U), ascending and k after the last;
    sees (B, k, m, U): an empty place, as every row must see something, sees them all.
    """
    k = members.shape[1]
    near = torch.where(members[..., None] >= 0, gather_rows(nearest, members.clamp(min=0)), k)  # (B, k, m, R)
    ascending = near.flatten(2).sort(dim=2).values
    first = ascending.diff(dim=2, prepend=ascending.new_full((1, 1, 1), -1).expand(*ascending.shape[:2], 1)) > 0
    first &= ascending < k
    column = first.cumsum(dim=2) - 1
    width = int(column.max()) + 1 if len(column) else 1
    union = ascending.new_full((*ascending.shape[:2], width + 1), k)
    union = union.scatter_(2, torch.where(first, column, width), torch.where(first, ascending, k))[..., :width]
    sees = (near[..., None] == union[:, :, None, None]).any(dim=3) | (members < 0)[..., None]
    return union, sees & (union < k)[:, :, None]
