"""Choosing the tokens that stay (paper sec. 3.3.1, 3.3.2), batched. Same choices as ``reference.selection``."""

import torch
from torch import nn

from . import ops
from .checks import FARTHEST, check_arrays, check_number, check_sides, check_whole, is_number, shown
from .ops.indexing import autocast_device


class Importance(nn.Module):
    """s = sigmoid(linear(f)): features (B, n, C) -> (B, n) in (0, 1), in at least float32 also under autocast."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, dim))
        self.bias = nn.Parameter(torch.zeros(1))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, features):
        with torch.autocast(autocast_device(features), enabled=False):
            wide = torch.promote_types(features.dtype, torch.float32)
            score = nn.functional.linear(features.to(wide), self.weight.to(wide), self.bias.to(wide))
            return score.squeeze(-1).sigmoid()


def token_counts(grid_size, rate, reserve=True, stages=4):
    """Compute how many tokens each stage has: n, then int(n * rate) after each merge.

    Parameters
    ----------
    grid_size : (h, w)
    rate : float
        0 < rate <= 1.
    reserve : bool
        Whether the coarse grid's tokens are always kept.
    stages : int

    Returns
    -------
    list of int

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
    h, w = grid_size
    counts = [h * w]
    for stage in range(1, stages):
        keep, spacing = int(counts[-1] * rate), 2 ** (stage + 1)
        needed = -(-h // spacing) * -(-w // spacing) if reserve else 1
        if keep < needed:
            return counts, f"stage {stage} would keep K = {keep} of {counts[-1]} tokens but must keep {needed}"
        counts.append(keep)
    return counts, None


def select(scores, prior, reserved, keep, alpha):
    """Choose the tokens that a merge keeps: the reserved ones, then the highest g + alpha s, ties in raster order.

    Parameters
    ----------
    scores, prior : (B, n) tensors
        s and g, tokens in raster order.
    reserved : (B, n) bool tensor
    keep : int
        K, 1 <= K <= n.
    alpha : float

    Returns
    -------
    (B, K) int64 tensor
        Indices in ascending order, that is raster order. No gradient passes through the choice.

    Raises
    ------
    ValueError
        K below 1, above n, or below the number of reserved tokens.
    """
    check_arrays(
        scores=(scores, "real", "B n"), prior=(prior, "real", "B n"), reserved=(reserved, "true or false", "B n")
    )
    check_whole("keep", keep, -(2**31))
    check_number("alpha", alpha)
    n = scores.shape[1]
    if not 1 <= keep <= n:
        raise ValueError(f"keep must be between 1 and the {n} tokens there are, not {keep}")
    count = int(reserved.sum(dim=1).amax()) if len(reserved) else 0
    if keep < count:
        raise ValueError(f"keep = {keep} is less than the {count} reserved tokens")
    return choose(scores, prior, reserved, keep, float(alpha))


def choose(scores, prior, reserved, keep, alpha):
    """``select`` without its checks that wait for a device."""
    check_arrays(
        scores=(scores, "real", "B n"), prior=(prior, "real", "B n"), reserved=(reserved, "true or false", "B n")
    )
    check_whole("keep", keep, 1, scores.shape[1])  # a compiled kernel writes so many
    value = prior.double() + alpha * scores.detach().double()
    return ops.choose(torch.where(reserved, torch.inf, value), keep)
