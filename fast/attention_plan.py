"""What each path of attention wants to know of a stage's clusters, worked out once a stage (paper sec. 3.1.2, 3.2)."""

import torch

from . import dispatch
from .indexing import gather_rows
from .position import relative_position

PAIRS_AT_ONCE = 1 << 16
FEATURES = 7  # dx, dy, distance, sine, cosine, one, mask
PLAN_SIZES = {"triton": 6, "clusters": 2, "gather": 2}  # tensors; the operator has no plain form


def attention_plan(positions, members, nearest, dtype=torch.float32, path=None):
    """Work out the plan of a path of attention, by default of the one that is taken on this device.

    Parameters
    ----------
    positions : (B, n, 2) int64 tensor
    members : (B, k, m) int64 tensor
        Token indices of each cluster, -1 in empty places.
    nearest : (B, n, R) int64 tensor
        Clusters that each token sees.
    dtype : torch.dtype
        Of relative positions.
    path : str, optional

    Returns
    -------
    tuple of tensors
        Two for "clusters" (``cluster_plan``), six for "triton" (``triton.plan.Plan``), none for "gather", unless
        it is asked for by name.
    """
    if path is None and dispatch.path("attention", positions.device) == "gather":
        return ()
    if (path or dispatch.path("attention", positions.device)) == "triton":
        from .triton.plan import make_plan

        return tuple(make_plan(positions, members, nearest)[: PLAN_SIZES["triton"]])
    return cluster_plan(positions, members, nearest, dtype)


def fake_plan(positions, members, nearest, dtype):
    """Tensors like those of ``attention_plan``, without values, for torch.compile; a union's size is not known then."""
    if dispatch.path("attention", positions.device) != "clusters":
        return attention_plan(positions, members, nearest, dtype)
    (batch, k, m), width = members.shape, 2 if members.shape[1] == 1 else torch.library.get_ctx().new_dynamic_size()
    features = positions.new_empty(FEATURES, batch * k, m, width * m, dtype=dtype)
    return positions.new_empty(batch * k, width), features


def cluster_plan(positions, members, nearest, dtype=torch.float32):
    """Work out what the clusters of a stage see; made once a stage, read by each of its blocks.

    Parameters
    ----------
    positions : (B, n, 2) int64 tensor
    members : (B, k, m) int64 tensor
        Token indices of each cluster, -1 in empty places.
    nearest : (B, n, R) int64 tensor
        Clusters that each token sees.
    dtype : torch.dtype
        Of the features.

    Returns
    -------
    union : (G, U) int64 tensor
        With G = B k: clusters that any token of a cluster sees, ascending, filled up with the last of them; then G, the
        blank token's.
    features : (7, G, m, S) tensor
        Of each token of the union seen from each token of the cluster. S = U m; the blank token is number S - m.
    """
    batch, k, m = members.shape
    union, seen = cluster_unions(members, nearest)
    there = members.clamp(min=0)
    theirs = gather_rows(positions, gather_rows(there, union).flatten(2)).flatten(0, 1)  # (G, U m, 2)
    own = gather_rows(positions, there).flatten(0, 1)  # (G, m, 2)
    features = _features(own, theirs, seen.flatten(0, 1), dtype)
    image = torch.arange(batch, device=union.device)[:, None, None]
    return torch.nn.functional.pad((union + image * k).flatten(0, 1), (0, 1), value=batch * k), features


def _features(own, theirs, seen, dtype):
    """own (G, m, 2), theirs (G, U m, 2), seen (G, m, U m) -> (7, G, m, U m + m); in slices that fit a cache."""
    (clusters, m), sources = own.shape[:2], theirs.shape[1]
    features = own.new_empty(FEATURES, clusters, m, sources + m, dtype=dtype)
    rows = max(1, PAIRS_AT_ONCE // (m * max(1, sources)))
    for part in (slice(start, start + rows) for start in range(0, clusters, rows)):
        pairs = features[:, part, :, :sources]
        pairs[:5] = relative_position(theirs[part, None] - own[part, :, None], dtype).movedim(-1, 0)
        pairs[5] = 1
        pairs[6] = torch.zeros_like(pairs[6]).masked_fill_(~seen[part], -torch.inf)
    features[..., sources:] = 0
    features[6, ..., sources + 1 :] = -torch.inf
    return features


def cluster_unions(members, nearest):
    """Clusters that each cluster's tokens see, and which of their tokens each token sees.

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
