"""Choosing the tokens that stay: importance, how many, which (paper sec. 3.3.1 and 3.3.2)."""

import numpy as np

from .checks import FARTHEST, check_arrays, check_number, check_sides, check_whole, is_number, shown
from .layers import linear, sigmoid


def importance(features, weights):
    """Return s (n,) in (0, 1), a linear layer and a sigmoid on features (n, C) (sec. 3.3.1)."""
    return sigmoid(linear(features, weights)[:, 0])


def token_counts(grid_size, rate, reserve=True, stages=4):
    """Compute how many tokens each stage has: n, then int(n * rate) after each merge (sec. 3.3.2).

    Parameters
    ----------
    grid_size : (h, w)
    rate : float
        Share of the tokens that a merge keeps, 0 < rate <= 1. The product is taken in float64 and truncated.
    reserve : bool
        Whether the coarse grid's tokens are always kept.
    stages : int

    Returns
    -------
    list of int
        One for each stage.

    Raises
    ------
    ValueError
        A rate outside (0, 1], or one that keeps fewer tokens than are reserved; the message names the stage, K, the
        number reserved and the smallest rate (to four digits) that would do.
    """
    check_sides("grid_size", grid_size, FARTHEST**2)
    check_whole("stages", stages, 1, 16)
    if not isinstance(reserve, bool):
        raise TypeError(f"reserve must be True or False, not {shown(reserve)}")
    if not is_number(rate) or not 0 < rate <= 1:
        raise ValueError(f"rate must be in (0, 1], not {shown(rate)}")
    counts, problem = _counts(grid_size, rate, reserve, stages)
    if problem:
        enough = next(r / 10000 for r in range(1, 10001) if not _counts(grid_size, r / 10000, reserve, stages)[1])
        raise ValueError(
            f"rate {rate} is too small for {grid_size[0]} x {grid_size[1]} cells: {problem}; use rate >= {enough}"
        )
    return counts


def _counts(grid_size, rate, reserve, stages):
    """Return the counts and, where a merge cannot keep what it must, a phrase that says so."""
    counts = [grid_size[0] * grid_size[1]]
    for stage in range(1, stages):
        keep = int(counts[-1] * rate)
        spacing = 2 ** (stage + 1)
        needed = -(-grid_size[0] // spacing) * -(-grid_size[1] // spacing) if reserve else 1
        if keep < needed:
            return counts, f"stage {stage} would keep K = {keep} of {counts[-1]} tokens but must keep {needed}"
        counts.append(keep)
    return counts, None


def select(scores, prior, reserved, keep, alpha):
    """Choose the tokens that a merge keeps (sec. 3.3.2).

    All reserved tokens stay; the rest of K go to the highest g + alpha s, equal ones in raster order.

    Parameters
    ----------
    scores : (n,) array
        s, tokens in raster order.
    prior : (n,) array
        g.
    reserved : (n,) bool array
        All False: nothing is reserved.
    keep : int
        K, 1 <= K <= n.
    alpha : float

    Returns
    -------
    (K,) int64 array
        Indices in ascending order, that is raster order.

    Raises
    ------
    ValueError
        K below 1, above n, or below the number of reserved tokens.
    """
    check_arrays(scores=(scores, "real", "n"), prior=(prior, "real", "n"), reserved=(reserved, "true or false", "n"))
    check_whole("keep", keep, -(2**31))
    check_number("alpha", alpha)
    n, count = len(scores), int(np.count_nonzero(reserved))
    if not 1 <= keep <= n:
        raise ValueError(f"keep must be between 1 and the {n} tokens there are, not {keep}")
    if keep < count:
        raise ValueError(f"keep = {keep} is less than the {count} reserved tokens")
    value = prior.astype(np.float64) + alpha * scores.astype(np.float64)
    best_first = np.lexsort((np.arange(n), -value, ~reserved))
    return np.sort(best_first[:keep])
