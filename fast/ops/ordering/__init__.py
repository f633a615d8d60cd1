"""Cluster order (paper sec. 3.1.1, Eq. 1) and choice (sec. 3.3.1, 3.3.2) as operators with two paths.

Everything is decided in integers, or by one division of two of them, to the last tie. No gradient passes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from . import plain


class Clusters(NamedTuple):
    """Tokens cut into k clusters of m; only the last may be shorter."""

    order: Tensor  # (B, n) int64: token indices, cluster after cluster
    cluster: Tensor  # (B, n) int64: the cluster of each token
    place: Tensor  # (B, n) int64: where each token is in ``order``
    members: Tensor  # (B, k, m) int64: token indices of each cluster; -1 where the last is short
    sums: Tensor  # (B, k, 2) int64: sum of the positions of each cluster


def cluster_tokens(positions, ranks, cluster_size, grid_size):
    """Cut the tokens into clusters, in the order of their patches, in a patch by Eq. 1, then in raster order.

    Parameters
    ----------
    positions : (B, n, 2) int64 tensor
        Distinct cells of the grid, in any order.
    ranks : (nh, nw) int64 tensor
        Of the patches along a curve: 0 ... nh nw - 1, each once.
    cluster_size : int
        m.
    grid_size : (h, w)

    Returns
    -------
    Clusters

    Raises
    ------
    ValueError
        Tokens off the grid, where compiled kernels run; elsewhere they are not noticed, or an index is too large.
    """
    path = dispatch.path("ordering", positions.device)
    return Clusters(*_cluster_tokens(positions, ranks, cluster_size, *grid_size, path))


@torch.library.custom_op("aff::cluster_tokens", mutates_args=())
def _cluster_tokens(
    positions: Tensor, ranks: Tensor, cluster_size: int, h: int, w: int, path: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of Clusters."""
    if path == "plain":
        return plain.cluster_tokens(positions, ranks, cluster_size, (h, w))
    return dispatch.run("ordering", path, _cpu().cluster_tokens, positions, ranks, cluster_size, (h, w))


@_cluster_tokens.register_fake
def _(positions, ranks, cluster_size, h, w, path):
    batch, n = positions.shape[:2]
    k = -(-n // cluster_size)
    shapes = (batch, n), (batch, n), (batch, n), (batch, k, cluster_size), (batch, k, 2)
    return tuple(positions.new_empty(shape) for shape in shapes)


def choose(value, keep):
    """Choose the largest values; of equal ones the first, and what is no number before all.

    Parameters
    ----------
    value : (B, n) float64 tensor
    keep : int
        K, 1 <= K <= n.

    Returns
    -------
    (B, K) int64 tensor
        Indices in ascending order.
    """
    path = dispatch.path("ordering", value.device)
    return plain.choose(value, keep) if path == "plain" else _choose(value, keep, path)


@torch.library.custom_op("aff::choose", mutates_args=())
def _choose(value: Tensor, keep: int, path: str) -> Tensor:
    return dispatch.run("ordering", path, _cpu().choose, value, keep)


@_choose.register_fake
def _(value, keep, path):
    return value.new_empty(value.shape[0], keep, dtype=torch.int64)


def _cpu():
    """The module of the compiled kernels."""
    from . import cpu

    return cpu


@dispatch.trial("ordering")
def _trial(path, device):
    """Clusters of 4 of 11 tokens in 2 x 2 patches, and the choice of 3 of 6 values with ties."""
    number = torch.arange(11, device=device)
    positions = torch.stack([number * 3 % 4, number // 3 * 2], dim=-1)[None]
    ranks = torch.tensor([[0, 1], [3, 2]], device=device)
    value = torch.tensor([[1.0, 5, -2, 5, 1, 1]], dtype=torch.float64, device=device)
    with dispatch.force(ordering=path):
        return [*cluster_tokens(positions, ranks, 4, (8, 4)), choose(value, 3)]
