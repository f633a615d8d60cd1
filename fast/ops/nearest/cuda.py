"""Nearest clusters, nearest tokens and local stride by CUDA kernels. Same results as the functions of those names.

Torch prepares a grid of buckets without waiting for the device: every shape follows from the number of points alone.
The kernels are in ``neighbors.cu``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import cuda_launch as kernels

PER_BUCKET = 2  # points, on average
MOST_NEAREST = 32  # beyond, a thread's list of the best no longer fits its registers
LARGEST_SPAN = 2**30  # so that squared distances (L1 too) fit int64


class Buckets(NamedTuple):
    """Points sorted by the bucket of a uniform grid that holds them, image after image."""

    points: Tensor  # (B n, 2) int64
    items: Tensor  # (B n,) int64: image * n + number of each of these points
    start: Tensor  # (B buckets + 1,) int64: where each bucket begins; the last ones of an image may be unused
    grid: Tensor  # (B, 5) int64: x and y of the origin, side of a bucket, buckets across, buckets down


def bucket_grid(points):
    """Sort points (B, n, 2) int64, n >= 1, into buckets that hold ``PER_BUCKET`` of them on average."""
    batch, n = points.shape[:2]
    low, span = points.amin(dim=1), points.amax(dim=1) - points.amin(dim=1) + 1
    torch._assert_async((span <= LARGEST_SPAN).all(), "positions so far apart that squared distances exceed int64")
    area, longest = span.double().prod(dim=1), span.double().amax(dim=1)
    side = torch.maximum((area * (PER_BUCKET / n)).sqrt(), longest * (PER_BUCKET / n)).ceil().long().clamp(min=1)
    size = (span + side[:, None] - 1) // side[:, None]  # (B, 2): buckets across, down
    buckets = 3 * n // PER_BUCKET + 8  # at least across * down: (a / side + 1) (b / side + 1) <= 3 n / PER_BUCKET + 1
    column, row = ((points - low[:, None]) // side[:, None, None]).unbind(-1)
    image = torch.arange(batch, device=points.device)[:, None]
    bucket, items = (image * buckets + row * size[:, :1] + column).flatten().sort(stable=True)
    start = torch.searchsorted(bucket, torch.arange(batch * buckets + 1, device=points.device))
    grid = torch.cat([low, side[:, None], size], dim=1)
    return Buckets(points.flatten(0, 1)[items], items, start, grid)


def nearest_clusters(positions, sums, counts, nearest):
    """Find the nearest cluster centres of every token, as ``neighborhoods.nearest_clusters`` does.

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
        Tensors that do not belong together, R above ``MOST_NEAREST``, too many tokens for one launch.
    RuntimeError
        A kernel that cannot be compiled. Distances beyond int64, which the device notices.
    """
    common_multiple = torch.lcm(counts[0], counts[-1])  # counts are m, ..., m, last
    centers = sums * (common_multiple // counts)[:, None]
    return _nearest(positions * common_multiple, centers, nearest, raster=False)


def nearest_tokens(queries, positions, nearest):
    """Find the nearest tokens of each query point, as ``neighborhoods.nearest_tokens`` does.

    Parameters
    ----------
    queries : (B, q, 2) tensor
        (x, y), in the same unit as the positions: integers, or real numbers, whose distances are taken in float64.
    positions : (B, n, 2) int64 tensor
    nearest : int
        k; all n tokens if it is more than n.

    Returns
    -------
    (B, q, k) int64 tensor
        Token indices, nearest first (L2); of two at the same distance the first in raster order comes first.

    Raises
    ------
    ValueError, RuntimeError
        As for ``nearest_clusters``.
    """
    return _nearest(queries, positions, nearest, raster=True)


def _nearest(queries, points, nearest, raster):
    """The nearest points (B, n, 2) to each query (B, q, 2); ties by raster order or by number."""
    _check_pair("queries", queries, "positions", points)
    nearest = min(nearest, points.shape[1])
    if nearest > MOST_NEAREST:
        raise ValueError(
            f"nearest: {nearest} are more than the {MOST_NEAREST} that the CUDA kernel keeps; use the grid"
        )
    result = (*queries.shape[:2], nearest)
    if 0 in result:
        return points.new_empty(result)
    kernels.check_threads(result[0] * result[1])
    queries, points = queries.detach(), points.detach()
    if queries.is_floating_point():
        queries = queries.double()
    else:
        span = torch.maximum(queries.amax(), points.amax()) - torch.minimum(queries.amin(), points.amin())
        torch._assert_async(span < LARGEST_SPAN, "queries so far off that squared distances exceed int64")
    queries, buckets, found = queries.contiguous(), bucket_grid(points), points.new_empty(result)
    sizes = (result[0] * result[1], result[1], points.shape[1], (len(buckets.start) - 1) // len(points), int(raster))
    kernel = "nearest_real" if queries.is_floating_point() else "nearest_whole"
    kernels.launch("neighbors", kernel, sizes[0], (queries, *buckets, found, *sizes), (("NEAREST", nearest),))
    return found


def _check_pair(name, tensor, other_name, other):
    for label, x in ((name, tensor), (other_name, other)):
        if x.ndim != 3 or x.shape[2] != 2:
            raise ValueError(f"{label} must have shape (B, number, 2), not {tuple(x.shape)}")
    if other.dtype != torch.int64 or not (tensor.dtype == torch.int64 or tensor.is_floating_point()):
        raise ValueError(f"{name} and {other_name} must be int64, not {tensor.dtype} and {other.dtype}")
    if len(tensor) != len(other) or tensor.device != other.device:
        raise ValueError(
            f"{name} and {other_name} must have one batch size and device, not {len(tensor)} on {tensor.device} "
            f"and {len(other)} on {other.device}"
        )


def local_stride(positions, metric="l2"):
    """Round the distance to the nearest other token up to a power of two, as ``grid_prior.local_stride`` does.

    Parameters
    ----------
    positions : (B, n, 2) int64 tensor
        Distinct (x, y).
    metric : {"l2", "l1"}

    Returns
    -------
    (B, n) int64 tensor
        t >= 1, cells. A single token has t = 1.

    Raises
    ------
    ValueError
        As for ``nearest_clusters``.
    RuntimeError
        As for ``nearest_clusters``.
    """
    _check_pair("positions", positions, "positions", positions)
    batch, n = positions.shape[:2]
    if batch == 0 or n < 2:
        return positions.new_ones(batch, n)
    kernels.check_threads(batch * n)
    positions = positions.detach().contiguous()
    buckets, stride = bucket_grid(positions), positions.new_empty(batch, n)
    sizes = (batch * n, n, (len(buckets.start) - 1) // batch, int(metric == "l1"))
    kernels.launch("neighbors", "local_stride", batch * n, (positions, *buckets, stride, *sizes))
    return stride


def warm(device="cuda", nearest=(1, 4, 6, 9)):
    """Run every kernel once on a few tokens, for none can be compiled while a CUDA graph is captured.

    Parameters
    ----------
    device : torch.device
    nearest : sequence of int
        The numbers of nearest things that will be asked for; each is a kernel of its own.

    Raises
    ------
    RuntimeError
        A kernel that cannot be compiled.
    """
    positions = torch.arange(80, device=device).view(1, 40, 2)
    for count in nearest:
        nearest_tokens(positions, positions, count)
        nearest_tokens(positions.double(), positions, count)
        nearest_clusters(positions, positions, torch.ones_like(positions[0, :, 0]), count)
    local_stride(positions)
