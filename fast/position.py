"""Expanded relative position (paper sec. 4.2, Eq. 5)."""

import torch
from torch import nn

from .checks import check_arrays


def relative_position(offsets, dtype=torch.float32):
    """Expand (dx, dy) to (dx, dy, distance, sine, cosine).

    Parameters
    ----------
    offsets : (..., 2) tensor
        (dx, dy) of a neighbour seen from a token, p_j - p_i, cells; any integer or floating dtype.
    dtype : torch.dtype
        Of the result.

    Returns
    -------
    (..., 5) tensor
        The angle's terms are 0 where the distance is 0.
    """
    check_arrays(offsets=(offsets, "real or whole", "... 2"))
    return torch.stack(position_terms(*offsets.to(dtype).unbind(-1)), dim=-1)


def position_terms(dx, dy):
    """Return the five terms of ``relative_position`` one by one: dx, dy, distance, sine, cosine."""
    distance = torch.sqrt(dx * dx + dy * dy)
    divisor = distance.clamp(min=torch.finfo(distance.dtype).tiny)  # 0 / tiny is 0
    return dx, dy, distance, dy / divisor, dx / divisor


class PositionLinear(nn.Linear):
    """A linear layer of relative positions, whose weights an operator reads: quantisers leave it as it is."""
