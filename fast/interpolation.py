"""Shepard interpolation: values between tokens, weighted by inverse distance (paper sec. 4.1), batched."""

import torch

from . import ops
from .checks import check_arrays, check_indices, check_number
from .ops.sampling.plain import FLOOR, HALF_POWER, shepard_weights

__all__ = ["FLOOR", "HALF_POWER", "shepard", "shepard_weights"]


def shepard(points, positions, features, nearest, half_power=HALF_POWER):
    """Interpolate the features of tokens at points.

    Parameters
    ----------
    points : (B, q, 2) tensor
    positions : (B, n, 2) tensor
    features : (B, n, C) tensor
    nearest : (B, q, k) int64 tensor
        Tokens to use for each point, as from ``neighborhoods.nearest_tokens``.
    half_power : float or (1,) tensor

    Returns
    -------
    (B, q, C) tensor
    """
    check_arrays(
        points=(points, "real or whole", "B q 2"), positions=(positions, "whole", "B n 2"),
        features=(features, "real", "B n C"), nearest=(nearest, "whole", "B q k"),
    )  # fmt: skip
    check_indices("nearest", nearest, positions.shape[1], -(2**31))  # negative: fewer than k
    if not nearest.shape[2]:
        raise ValueError("nearest must name at least one token for each point, not none")
    if torch.is_tensor(half_power):
        check_arrays(half_power=(half_power, "real", "1"))
    else:
        check_number("half_power", half_power)
    positions, wide = positions.long(), torch.promote_types(features.dtype, torch.float32)
    power = half_power if torch.is_tensor(half_power) else features.new_full((1,), half_power, dtype=wide)
    points, nearest = points[:, :, None, None], nearest[:, :, None, None]  # one head, one location
    return ops.sample(points, None, positions, features[:, :, None], nearest, power).squeeze(2)
