"""Expanded relative position (paper sec. 4.2, Eq. 5)."""

import numpy as np

from .checks import check_arrays


def relative_position(offsets):
    """Expand (dx, dy) to (dx, dy, distance, sine, cosine) (Eq. 5).

    The distance does not change when the picture is turned, the sine and cosine not when it is scaled.

    Parameters
    ----------
    offsets : (..., 2) array
        (dx, dy) of a neighbour seen from a token, p_j - p_i, cells.

    Returns
    -------
    (..., 5) float64 array
        The angle's terms are 0 where the distance is 0. Sine comes before cosine, as in the released weights.
    """
    check_arrays(offsets=(offsets, "real or whole", "... 2"))
    dx, dy = np.moveaxis(np.asarray(offsets, dtype=np.float64), -1, 0)
    distance = np.sqrt(dx**2 + dy**2)
    divisor = np.where(distance == 0, 1.0, distance)
    return np.stack([dx, dy, distance, dy / divisor, dx / divisor], axis=-1)
