"""Shepard interpolation: values between tokens, weighted by inverse distance (paper sec. 4.1), batched."""

import torch

from .ops import dispatch
from .ops.indexing import gather_rows, weighted_sum
from .ops.sampling import FLOOR

HALF_POWER = 3.0  # a = power / 2 with the power 6 of the paper


def shepard_weights(points, neighbors, half_power=HALF_POWER):
    """Weights of the neighbours of each point, in at least float32.

    Parameters
    ----------
    points : (..., 2) tensor
        Where a value is wanted, (x, y), cells.
    neighbors : (..., k, 2) tensor
        Positions of the k tokens used for it.
    half_power : float or (1,) tensor
        a, half the power of the distance; may be learnt.

    Returns
    -------
    (..., k) tensor
        w = u / sum u with u = 1 / ((d^2)^a + 1e-11).
    """
    wide = torch.promote_types(points.dtype, torch.float32) if points.is_floating_point() else torch.float32
    squared = (neighbors.to(wide) - points.to(wide)[..., None, :]).square().sum(dim=-1)
    own = squared == 0  # kept out of the power, whose gradient at 0 is not finite once a < 1
    u = 1 / ((squared.masked_fill(own, 1) ** half_power).masked_fill(own, 0) + FLOOR)
    return u / u.sum(dim=-1, keepdim=True)


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
    wide = torch.promote_types(features.dtype, torch.float32)
    if dispatch.path("interpolation", features.device) != "gather":
        power = half_power if torch.is_tensor(half_power) else points.new_full((1,), half_power, dtype=wide)
        one = points[:, :, None, None], None, positions, features[:, :, None], nearest[:, :, None, None]  # head, place
        return torch.ops.aff.read_places(*one, power).squeeze(2)
    weights = shepard_weights(points.to(wide), gather_rows(positions, nearest), half_power).to(features.dtype)
    return weighted_sum(weights, gather_rows(features, nearest))
