"""Where a grid would keep tokens: local stride, grid prior, reserved tokens (paper sec. 3.3.2)."""

import numpy as np
from scipy.spatial import cKDTree

from .checks import check_arrays, check_choice, check_indices, check_span, check_whole

METRICS = ("l2", "l1")


def local_stride(positions, metric="l2"):
    """Round the distance to the nearest other token up to a power of two (sec. 3.3.2).

    Parameters
    ----------
    positions : (n, 2) int64 array
        Distinct (x, y).
    metric : {"l2", "l1"}
        "l2" is what the released models use, "l1" what the paper's formula says.

    Returns
    -------
    (n,) int64 array
        t >= 1, cells. A single token has t = 1.

    Raises
    ------
    ValueError
        Unknown metric.
    """
    check_choice("metric", metric, METRICS)
    check_arrays(positions=(positions, "whole", "n 2"))
    check_span(positions, positions)
    gap = np.abs(positions[:, None] - positions)  # (n, n, 2)
    distance = (gap**2).sum(axis=-1) if metric == "l2" else gap.sum(axis=-1) ** 2  # squared: stays an integer
    np.fill_diagonal(distance, np.iinfo(np.int64).max)
    return _power_of_two(distance.min(axis=1)) if len(positions) > 1 else np.ones(1, dtype=np.int64)


def local_stride_kdtree(positions, metric="l2"):
    """Compute the same as ``local_stride`` through SciPy's k-d tree: the check on it (sec. 3.3.2)."""
    check_arrays(positions=(positions, "whole", "n+ 2"))
    check_choice("metric", metric, METRICS)
    if len(positions) == 1:
        return np.ones(1, dtype=np.int64)
    distance = cKDTree(positions).query(positions, k=[2], p={"l2": 2, "l1": 1}[metric])[0][:, 0]
    return _power_of_two(np.rint(distance**2).astype(np.int64))


def _power_of_two(squared_distance):
    """Return the smallest power of two t >= 1 with t^2 >= squared_distance."""
    t = np.ones_like(squared_distance)
    while (too_small := t**2 < squared_distance).any():
        t[too_small] *= 2
    return t


def grid_prior(positions, stride):
    """Return g (n,) float64: 1 where both coordinates are multiples of twice the local stride, else 0 (sec. 3.3.2)."""
    check_arrays(positions=(positions, "whole", "n 2"), stride=(stride, "whole", "n"))
    check_indices("stride", stride, 2**62, 1)
    return (positions % (2 * stride[:, None]) == 0).all(axis=1).astype(np.float64)


def reserved_tokens(positions, stage):
    """Return (n,) bool: the tokens on the grid of spacing 2^(stage + 1), which the merge of stage 1, 2 or 3 keeps.

    Sec. 3.3.2.
    """
    check_arrays(positions=(positions, "whole", "n 2"))
    check_whole("stage", stage, 1, 16)
    return (positions % 2 ** (stage + 1) == 0).all(axis=1)
