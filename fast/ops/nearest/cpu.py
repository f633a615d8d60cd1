"""Nearest clusters, nearest tokens and local stride by compiled CPU kernels."""

import math

import torch

from .. import native
from ..indexing import gather_rows
from .grid import nearest_items
from .plain import LARGEST

SOURCE = "nearest/cpu.cpp"
LARGEST_SPAN = 2**31 - 1


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
        Positions so far apart that squared distances do not fit in int64.
    """
    nearest = min(nearest, len(counts))
    least_multiple = math.lcm(int(counts[0]), int(counts[-1]))
    centres = sums * (least_multiple // counts)[:, None]
    found = _nearest_whole(positions, centres, nearest, scale=least_multiple, raster=False)
    return nearest_items(positions * least_multiple, centres, nearest)[0] if found is None else found


def nearest_tokens(queries, positions, nearest):
    """Find the nearest tokens of each query point.

    Parameters
    ----------
    queries : (B, q, 2) tensor
        (x, y), in the same unit as the positions: integers, or floating point; those are compared in float64.
    positions : (B, n, 2) int64 tensor
        In any order.
    nearest : int
        k; all n tokens if it is more than n.

    Returns
    -------
    (B, q, k) int64 tensor
        Token indices, nearest first (L2); of two at the same distance the first in raster order comes first.

    Raises
    ------
    ValueError
        Integers so far apart that squared distances do not fit in int64.
    """
    nearest = min(nearest, positions.shape[1])
    find = _nearest_real if queries.is_floating_point() else _nearest_whole
    found = find(queries, positions, nearest, raster=True)
    if found is not None:
        return found
    x, y = positions.unbind(-1)
    raster = x.argsort(dim=1, stable=True)
    raster = raster.gather(1, y.gather(1, raster).argsort(dim=1, stable=True))
    found = nearest_items(queries, gather_rows(positions, raster), nearest)[0]
    return raster.gather(1, found.flatten(1)).view_as(found)


def local_stride(positions, metric="l2"):
    """Round the distance to the nearest other token up to a power of two.

    Parameters
    ----------
    positions : (B, n, 2) int64 tensor
    metric : {"l2", "l1"}

    Returns
    -------
    (B, n) int64 tensor
        t >= 1, cells. A single token has t = 1.

    Raises
    ------
    ValueError
        Positions so far apart that squared distances do not fit in int64.
    """
    batch, n = positions.shape[:2]
    if batch == 0 or n < 2:
        return positions.new_ones(batch, n)
    positions = positions.detach().contiguous()
    low, span = _extent(positions)
    if not _fits(span, metric):
        squared = nearest_items(positions, positions, 2, metric)[1][..., 1].contiguous()
        return 1 << torch.bucketize(squared, 4 ** torch.arange(32))
    stride = positions.new_empty(batch, n)
    native.call(SOURCE, "local_stride", positions, stride, batch, n, low, metric == "l1")
    return stride


def _nearest_whole(queries, items, nearest, *, scale=1, raster):
    """The nearest items (B, n, 2) of queries (B, q, 2) times ``scale``, or None if a distance may not fit in int64."""
    queries, items = queries.detach().long().contiguous(), items.detach().contiguous()
    found = items.new_empty(*queries.shape[:2], nearest)
    if found.numel() == 0:
        return found
    low, span = _extent(items, queries, scale)
    if not _fits(span):
        return None
    sizes = (len(queries), queries.shape[1], items.shape[1], nearest)
    native.call(SOURCE, "nearest_whole", queries, items, found, *sizes, scale, low, raster)
    return found


def _nearest_real(queries, items, nearest, *, raster):
    """The same for real queries; None if the items are too far apart for the kernel."""
    queries, items = queries.detach().double().contiguous(), items.detach().contiguous()
    found = items.new_empty(*queries.shape[:2], nearest)
    if found.numel() == 0:
        return found
    if _extent(items)[1] > LARGEST_SPAN:
        return None
    sizes = (len(queries), queries.shape[1], items.shape[1], nearest)
    native.call(SOURCE, "nearest_real", queries, items, found, *sizes, raster)
    return found


def _extent(items, queries=None, scale=1):
    """The lowest coordinate of items, and of queries times ``scale``, and how far above it the highest is."""
    low, high = (int(v) for v in items.aminmax())
    if queries is not None and queries is not items:
        query_low, query_high = (int(v) * scale for v in queries.aminmax())
        low, high = min(low, query_low), max(high, query_high)
    return low, high - low


def _fits(span, metric="l2"):
    return (2 if metric == "l2" else 4) * span**2 <= LARGEST
