"""Local stride, grid prior, reserved tokens (paper sec. 3.3.2), batched. Same results as ``reference.grid_prior``."""

from .checks import check_arrays, check_indices, check_whole
from .ops.nearest import METRICS, local_stride

__all__ = ["METRICS", "grid_prior", "local_stride", "reserved_tokens"]


def grid_prior(positions, stride):
    """Return g (B, n) float64: 1 where both coordinates are multiples of twice the local stride, else 0."""
    check_arrays(positions=(positions, "whole", "B n 2"), stride=(stride, "whole", "B n"))
    check_indices("stride", stride, 2**62, 1)
    return (positions % (2 * stride[..., None]) == 0).all(dim=-1).double()


def reserved_tokens(positions, stage):
    """Return (B, n) bool: the tokens on the grid of spacing 2^(stage + 1), which the merge of stage 1, 2 or 3 keeps."""
    check_arrays(positions=(positions, "whole", "B n 2"))
    check_whole("stage", stage, 1, 16)
    return (positions % 2 ** (stage + 1) == 0).all(dim=-1)
