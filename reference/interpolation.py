"""Shepard interpolation: values between tokens, weighted by inverse distance (paper sec. 4.1)."""

import numpy as np

from .checks import check_arrays, check_indices, check_number

FLOOR = 1e-11  # added to (d^2)^a, so that a token's own place is no division by zero
HALF_POWER = 3.0  # a = power / 2 with the power 6 of the paper


def shepard_weights(points, neighbors, half_power=HALF_POWER):
    """Weights of the neighbours of each point (sec. 4.1).

    Parameters
    ----------
    points : (..., 2) array
        Where a value is wanted, (x, y), cells.
    neighbors : (..., k, 2) array
        Positions of the k tokens used for it.
    half_power : float
        a, half the power of the distance.

    Returns
    -------
    (..., k) float64 array
        w = u / sum u with u = 1 / ((d^2)^a + 1e-11).
    """
    check_arrays(points=(points, "real or whole", "... 2"), neighbors=(neighbors, "real or whole", "... k 2"))
    if isinstance(half_power, np.ndarray):
        check_arrays(half_power=(half_power, "real", "1"))
    else:
        check_number("half_power", half_power)
    squared = ((neighbors - points[..., None, :]) ** 2).sum(axis=-1, dtype=np.float64)
    u = 1.0 / (squared**half_power + FLOOR)
    return u / u.sum(axis=-1, keepdims=True)


def shepard(points, positions, features, nearest, half_power=HALF_POWER):
    """Interpolate the features of tokens at points (sec. 4.1).

    Parameters
    ----------
    points : (q, 2) array
    positions : (n, 2) array
    features : (n, C) array
    nearest : (q, k) int64 array
        Tokens to use for each point, as from ``neighborhoods.nearest_tokens``.
    half_power : float

    Returns
    -------
    (q, C) float64 array
    """
    check_arrays(
        points=(points, "real or whole", "q 2"), positions=(positions, "whole", "n 2"),
        features=(features, "real", "n C"), nearest=(nearest, "whole", "q k"),
    )  # fmt: skip
    check_indices("nearest", nearest, len(positions))
    if not nearest.shape[1]:
        raise ValueError("nearest must name at least one token for each point, not none")
    weights = shepard_weights(points, positions[nearest], half_power)
    return np.einsum("qk,qkc->qc", weights, features[nearest])
