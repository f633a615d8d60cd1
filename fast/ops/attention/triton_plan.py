"""A stage's geometry, laid out for the attention kernels: places, and which clusters each group of clusters sees."""

from typing import NamedTuple

import torch
from torch import Tensor

GLOBAL_CLUSTER = 32  # rows of a program where every token sees all
LARGEST_CLUSTER = 128  # tokens; more do not fit a program
LARGEST = 2**31 - 1


class Plan(NamedTuple):
    """What the kernels need of a stage's geometry; made once a stage. The batch axis may have length 1.

    A group is ``group_size(cluster_size)`` clusters. Where every token sees all, R is 0 and there are no lists.
    """

    cells: Tensor  # (B, 3, P) int32: whether a place has a token (1 or 0), its x, its y
    near: Tensor  # (B, R, P) int32: clusters that each place's token sees; -2 where it is empty
    visible_start: Tensor  # (B groups + 1,) int32: where each group's part of `visible` starts
    visible: Tensor  # (B P R,) int32: clusters seen by the rows of each group, ascending
    seers_start: Tensor  # (B groups + 1,) int32: the same for `seers`
    seers: Tensor  # (B P R,) int32: clusters with a row that sees a cluster of the group, ascending
    cluster_size: int  # m


def group_size(cluster_size):
    """Return how many clusters a program works on, so that it has 16 rows or nearly."""
    return max(1, 16 // cluster_size)


def make_plan(positions, members, nearest):
    """Lay a stage's geometry out for the kernels: pure torch, sizes known beforehand, no synchronisation.

    P = k m. How the tokens are numbered does not matter: the kernels know them by their places.

    Parameters
    ----------
    positions : (B or 1, n, 2) int64 tensor
        Finest grid's units; less than 2^24.
    members : (B or 1, k, m) int64 tensor
        Tokens of each cluster, -1 in empty places. k = 1: every token sees all.
    nearest : (B or 1, n, R) int64 tensor
        The clusters that each token sees. Not read if k = 1.

    Returns
    -------
    Plan

    Raises
    ------
    ValueError
        Too large a cluster, or more places or list entries than 32-bit indices hold.
    """
    batch = min(len(positions), len(members), len(nearest)) and max(len(positions), len(members), len(nearest))
    k, m = members.shape[1:]
    everything = k == 1
    if everything:
        nearest = nearest[..., :0]
    elif m > LARGEST_CLUSTER:
        raise ValueError(
            f"the kernels hold clusters of at most {LARGEST_CLUSTER} tokens, not {m}; use a smaller cluster_size"
        )
    token = members.flatten(1).expand(batch, -1)  # (B, P)
    places, wide = token.shape[1], nearest.shape[2]
    if batch * places * max(3, wide) > LARGEST:
        raise ValueError(f"{batch} x {places} places of {wide} clusters do not fit 32-bit indices; use a smaller batch")
    index, there = token.clamp(min=0), token >= 0
    xy = positions.expand(batch, -1, -1).gather(1, index[..., None].expand(-1, -1, 2))
    cells = torch.stack([there, xy[..., 0], xy[..., 1]], dim=1).int()
    near = nearest.expand(batch, -1, -1).gather(1, index[..., None].expand(-1, -1, wide))  # (B, P, R)
    if everything:
        lists = [token.new_empty(0, dtype=torch.int32) for _ in range(4)]
    else:
        size = group_size(m)
        cluster = torch.arange(places, device=token.device)[:, None] // m
        lists = [
            *_lists(cluster // size, near, there, -(-k // size), k),
            *_lists(near // size, cluster, there, -(-k // size), k),
        ]
    near = torch.where(there[..., None], near, -2).int().transpose(1, 2).contiguous()
    return plan_of((cells, near, *lists), members)


def plan_of(tensors, members):
    """Return the Plan made of its tensors and the members (B, k, m) that it was made from."""
    k, m = members.shape[1:]
    return Plan(*tensors, m if k > 1 else 16 if m <= 16 else GLOBAL_CLUSTER)


def _lists(group, cluster, there, groups, k):
    """Clusters that belong to each group, each once: where each group's list starts, and the lists.

    group, cluster (B or 1, P, R or 1); there (B, P) bool -> (B groups + 1,), (B P R,) int32; the tail is not used.
    """
    batch = len(there)
    image = torch.arange(batch, device=there.device)[:, None, None]
    after = batch * groups * k
    pair = torch.where(there[..., None], (image * groups + group) * k + cluster, after).flatten()
    pair = (pair.int() if after <= LARGEST else pair).sort().values
    again = torch.cat([torch.zeros_like(pair[:1], dtype=torch.bool), pair[1:] == pair[:-1]])
    pair = pair.masked_fill(again, after).sort().values
    bounds = k * torch.arange(batch * groups + 1, device=pair.device)
    return torch.searchsorted(pair, bounds.to(pair.dtype), out_int32=True), (pair % k).int()
