"""What the launches of all gathering kernels share: precision, tile sizes, limits."""

import torch
import triton.language as tl

LARGEST = 2**31 - 1  # count of programs, and of the slots of one image
TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}  # that kernels compute in


def wide_type(*tensors):
    """Return the dtype that a kernel computes in: float64 if any floating input has it, else float32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def tile(size, most):
    """Return the smallest power of two that holds ``size``, at most ``most``."""
    return min(most, 1 << max(0, size - 1).bit_length())


def warps(elements):
    """Return the number of warps for a tile of so many elements: 16 or more to each thread, at most 4 warps."""
    return max(1, min(4, elements // 512))


def check_count(count, what):
    """Refuse more of something than the kernels can number.

    Raises
    ------
    ValueError
        Names what there are too many of.
    """
    if count > LARGEST:
        raise ValueError(f"{count} {what} are more than a kernel can number ({LARGEST}); use a smaller batch or image")
