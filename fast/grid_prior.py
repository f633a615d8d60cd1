"""Local stride, grid prior, reserved tokens (paper sec. 3.3.2), batched. Same results as ``reference.grid_prior``."""

import torch
from torch import Tensor

from .ops.nearest.grid import search_on

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
        Unknown metric, or positions so far apart that squared distances would not fit in int64.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, not {metric!r}")
    return torch.ops.aff.local_stride(positions, metric)


@torch.library.custom_op("aff::local_stride", mutates_args=())
def _local_stride(positions: Tensor, metric: str) -> Tensor:
    """``local_stride`` as an operator of torch.library: one opaque step for torch.compile."""

    def on_gpu():
        from .ops.nearest import cuda

        return cuda.local_stride(positions, metric)

    def by(search):
        squared = search(positions, positions, 2, metric)[1][..., 1].contiguous()  # the first is the token itself
        exponent = torch.bucketize(squared, 4 ** torch.arange(32, device=positions.device))
        return 1 << exponent

    if positions.shape[1] == 1:
        return torch.ones_like(positions[..., 0], memory_format=torch.contiguous_format)
    return search_on(positions.device, 2, on_gpu, by)


@_local_stride.register_fake
def _(positions, metric):
    return positions.new_empty(positions.shape[:2])


def grid_prior(positions, stride):
    """Return g (B, n) float64: 1 where both coordinates are multiples of twice the local stride, else 0."""
    return (positions % (2 * stride[..., None]) == 0).all(dim=-1).double()


def reserved_tokens(positions, stage):
    """Return (B, n) bool: the tokens on the grid of spacing 2^(stage + 1), which the merge of stage 1, 2 or 3 keeps."""
    return (positions % 2 ** (stage + 1) == 0).all(dim=-1)
