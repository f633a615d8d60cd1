"""Local stride, grid prior, reserved tokens (paper sec. 3.3.2), batched. Same results as ``reference.grid_prior``."""

import torch

from .neighborhoods import PAIRS_AT_ONCE

METRICS = ("l2", "l1")


def local_stride(positions, metric="l2"):
    """Round the distance to the nearest other token up to a power of two.

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
        Unknown metric.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, not {metric!r}")
    batch, n = positions.shape[:2]
    stride = positions.new_ones(batch, n)
    if n == 1:
        return stride
    rows = max(1, PAIRS_AT_ONCE // max(1, batch * n))
    squared = torch.cat([_nearest_other(positions, i, min(i + rows, n), metric) for i in range(0, n, rows)], dim=1)
    while True:
        too_small = stride * stride < squared
        if not too_small.any():
            return stride
        stride = torch.where(too_small, 2 * stride, stride)


def _nearest_other(positions, start, stop, metric):
    """Squared distance (B, stop - start) from tokens start ... stop - 1 to the nearest other token."""
    dx = positions[:, start:stop, None, 0] - positions[:, None, :, 0]
    dy = positions[:, start:stop, None, 1] - positions[:, None, :, 1]
    distance = dx.square_().add_(dy.square_()) if metric == "l2" else dx.abs_().add_(dy.abs_()).square_()
    distance.diagonal(offset=start, dim1=1, dim2=2).fill_(torch.iinfo(torch.int64).max)
    return distance.amin(dim=2)


def grid_prior(positions, stride):
    """Return g (B, n) float64: 1 where both coordinates are multiples of twice the local stride, else 0."""
    return (positions % (2 * stride[..., None]) == 0).all(dim=-1).double()


def reserved_tokens(positions, stage):
    """Return (B, n) bool: the tokens on the grid of spacing 2^(stage + 1), which the merge of stage 1, 2 or 3 keeps."""
    return (positions % 2 ** (stage + 1) == 0).all(dim=-1)
