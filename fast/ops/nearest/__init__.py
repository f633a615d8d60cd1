"""Nearest clusters, nearest tokens and local stride (paper sec. 3.1.2, 3.3.2), exact, as operators with several paths.

Which path runs is looked up when an operator is called (``dispatch``); no gradient passes.
"""

import torch
from torch import Tensor

from ...checks import check_arrays, check_choice, check_whole
from .. import dispatch
from ..indexing import gather_rows
from .grid import nearest_items
from .plain import nearest_of_all

METRICS = ("l2", "l1")
MOST_ON_GPU = 32  # nearest items that the CUDA kernels keep
_SEARCH = {"grid": nearest_items, "plain": nearest_of_all}


def nearest_clusters(positions, sums, counts, nearest):
    """Find the nearest cluster centres of every token, compared in integers.

    Parameters
    ----------
    positions : (B, n, 2) integer tensor
    sums, counts : (B, k, 2) and (k,) integer tensors
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
    check_arrays(positions=(positions, "whole", "B n 2"), sums=(sums, "whole", "B k 2"), counts=(counts, "whole", "k"))
    check_whole("nearest", nearest, 1)
    return _nearest_clusters(positions.long(), sums.long(), counts.long(), min(nearest, len(counts)))


@torch.library.custom_op("aff::nearest_clusters", mutates_args=())
def _nearest_clusters(positions: Tensor, sums: Tensor, counts: Tensor, nearest: int) -> Tensor:
    path = _path(positions, nearest)
    if path in _SEARCH:
        least_multiple = torch.lcm(counts[0], counts[-1])  # counts are m, ..., m, last
        centers = sums * (least_multiple // counts)[:, None]
        return _SEARCH[path](positions * least_multiple, centers, nearest)[0]
    return dispatch.run("nearest", path, _kernels(path).nearest_clusters, positions, sums, counts, nearest)


@_nearest_clusters.register_fake
def _(positions, sums, counts, nearest):
    return positions.new_empty(*positions.shape[:2], nearest)


def nearest_tokens(queries, positions, nearest, grid_size=None):
    """Find the nearest tokens of each query point.

    Parameters
    ----------
    queries : (B, q, 2) tensor
        (x, y), in the same unit as the positions: int64, or floating point; those are compared in float64.
    positions : (B, n, 2) integer tensor
    nearest : int
        k; all n tokens if it is more than n.
    grid_size : (h, w), optional
        If the positions are cells of it, PyTorch's paths put them in raster order by one sort instead of two.

    Returns
    -------
    (B, q, k) int64 tensor
        Token indices, nearest first (L2); of two at the same distance the first in raster order comes first.

    Raises
    ------
    ValueError
        Integers so far apart that squared distances would not fit in int64.
    """
    check_arrays(queries=(queries, "real or whole", "B q 2"), positions=(positions, "whole", "B n 2"))
    check_whole("nearest", nearest, 1)
    width = None if grid_size is None else grid_size[1]
    return _nearest_tokens(queries, positions.long(), min(nearest, positions.shape[1]), width)


@torch.library.custom_op("aff::nearest_tokens", mutates_args=())
def _nearest_tokens(queries: Tensor, positions: Tensor, nearest: int, width: int | None) -> Tensor:
    path = _path(positions, nearest)
    if path in _SEARCH:
        raster = _raster_order(positions, width)
        found = _SEARCH[path](queries, gather_rows(positions, raster), nearest)[0]
        return raster.gather(1, found.flatten(1)).view_as(found)
    return dispatch.run("nearest", path, _kernels(path).nearest_tokens, queries, positions, nearest)


@_nearest_tokens.register_fake
def _(queries, positions, nearest, width):
    return positions.new_empty(*queries.shape[:2], nearest)


def _raster_order(positions, width):
    """Indices (B, n) that put positions in raster order; width of the grid, if they are cells of one."""
    x, y = positions.unbind(-1)
    if width is not None:
        return (y * width + x).argsort(dim=1)
    by_x = x.argsort(dim=1)
    return by_x.gather(1, y.gather(1, by_x).argsort(dim=1, stable=True))


def local_stride(positions, metric="l2"):
    """Round the distance to the nearest other token up to a power of two.

    Parameters
    ----------
    positions : (B, n, 2) integer tensor
        Distinct (x, y).
    metric : {"l2", "l1"}

    Returns
    -------
    (B, n) int64 tensor
        t >= 1, cells. A single token has t = 1.

    Raises
    ------
    ValueError
        Unknown metric, or positions so far apart that squared distances would not fit in int64.
    """
    check_choice("metric", metric, METRICS)
    check_arrays(positions=(positions, "whole", "B n 2"))
    return torch.ops.aff.local_stride(positions.long(), metric)


@torch.library.custom_op("aff::local_stride", mutates_args=())
def _local_stride(positions: Tensor, metric: str) -> Tensor:
    if positions.shape[1] == 1:
        return torch.ones_like(positions[..., 0], memory_format=torch.contiguous_format)
    path = _path(positions, 2)
    if path in _SEARCH:
        squared = _SEARCH[path](positions, positions, 2, metric)[1][..., 1].contiguous()  # [0] is the token itself
        return 1 << torch.bucketize(squared, 4 ** torch.arange(32, device=positions.device))
    return dispatch.run("nearest", path, _kernels(path).local_stride, positions, metric)


@_local_stride.register_fake
def _(positions, metric):
    return positions.new_empty(positions.shape[:2])


def _path(positions, nearest):
    """The path to take; more neighbours than the CUDA kernels keep are searched for in PyTorch."""
    path = dispatch.path("nearest", positions.device)
    return "grid" if path == "cuda" and nearest > MOST_ON_GPU else path


def _kernels(path):
    """The module of a path's kernels."""
    if path == "cuda":
        from . import cuda

        return cuda
    from . import cpu

    return cpu


@dispatch.trial("nearest")
def _trial(path, device):
    """The 3 nearest of 9 tokens, the 2 nearest of 3 clusters, and local strides."""
    number = torch.arange(9, device=device)
    positions = torch.stack([number % 3 * 2, number // 3 * 3], dim=-1)[None]
    sums, counts = positions[:, ::3] * 4 + 1, torch.full((3,), 4, device=device)
    with dispatch.force(nearest=path):
        return [
            nearest_tokens(positions, positions, 3),
            nearest_clusters(positions, sums, counts, 2),
            local_stride(positions),
        ]
