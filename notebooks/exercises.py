"""The checks of notebook 15's exercises: each raises AssertionError with a hint until the function is right.

``answers.py`` holds a solution of each; ``tests/test_exercises.py`` holds them to these checks, and the
functions that the notebook gives to start from must fail them.
"""

from fractions import Fraction

import numpy as np

from reference import clustering, position, selection
from reference.patch_embedding import grid_positions


def report(check, *functions):
    """Print "right", or what a check still finds wrong."""
    try:
        check(*functions)
    except AssertionError as error:
        print("not yet:", error)
    else:
        print("right")


def check_hilbert(hilbert):
    """Hilbert's curve: hilbert(order) -> the cells (x, y) of a 2^order x 2^order grid, top left to top right."""
    for order in range(6):
        side, path = 2**order, [tuple(cell) for cell in hilbert(order)]
        every = {(x, y) for x in range(side) for y in range(side)}
        assert len(path) == side**2 and set(path) == every, f"order {order}: not each cell once"
        for a, b in zip(path, path[1:], strict=False):
            assert abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1, f"order {order}: from {a} to {b} is no step to a neighbour"
        assert (path[0], path[-1]) == ((0, 0), (side - 1, 0)), f"order {order}: goes from {path[0]} to {path[-1]}"
        places = np.array(path)
        for gap in range(1, len(path)):
            farthest = ((places[gap:] - places[:-gap]) ** 2).sum(axis=1).max()
            assert farthest <= 6 * gap, f"order {order}: {gap} apart on the string, {farthest**0.5:.1f} in the picture"


def check_tie_rule(nearest):
    """nearest(token, sums, counts, R) -> the R nearest clusters, exact, whatever the clusters' numbers are."""
    grid_size, m, R = (11, 13), 4, 5
    tokens = grid_positions(grid_size)
    order, _ = clustering.balanced_clusters(tokens, m, grid_size)
    sums, counts = clustering.cluster_sums(tokens, order, m)
    shuffled = np.random.default_rng(0).permutation(len(counts))
    for token in tokens.tolist():
        found = [int(j) for j in nearest(token, sums, counts, R)]
        squared = [_squared_distance(token, s, c) for s, c in zip(sums.tolist(), counts.tolist(), strict=True)]
        assert len(set(found)) == R, f"token {token}: {found} are not {R} different clusters"
        assert [squared[j] for j in found] == sorted(squared)[:R], (
            f"token {token}: {found} are not the nearest in order"
        )
        again = [int(shuffled[j]) for j in nearest(token, sums[shuffled], counts[shuffled], R)]
        assert again == found, f"token {token}: with other numbers for the clusters the answer changes"


def _squared_distance(token, total, count):
    return sum((Fraction(s, count) - p) ** 2 for s, p in zip(total, token, strict=True))


def check_without_distance(expand, near_me):
    """Eq. 5 without the distance: expand(offsets) -> (n, 4), and near_me of it -> -0.6 times the distance."""
    offsets = grid_positions((15, 15)) - 7
    e, full = np.asarray(expand(offsets), dtype=float), position.relative_position(offsets)
    assert e.shape == (225, 4), f"expand gives shape {e.shape}, not (225, 4)"
    assert np.allclose(e, full[:, [0, 1, 3, 4]]), (
        "expand is not (dx, dy, sine, cosine), 0 for both angles at distance 0"
    )
    logits = np.asarray(near_me(e), dtype=float)
    assert logits.shape == (225,), f"near_me gives shape {logits.shape}, not (225,)"
    worst = np.abs(logits + 0.6 * full[:, 2]).max()
    assert worst < 1e-9, f"near_me is off by up to {worst:.2f}"


def check_select(select):
    """select(scores, prior, reserved, keep, alpha) -> the indices kept, ascending, ties in raster order."""
    rng = np.random.default_rng(0)
    for case in range(200):
        n = int(rng.integers(4, 30))
        scores, prior = rng.integers(0, 4, n) / 4, rng.integers(0, 2, n).astype(float)  # coarse: full of ties
        reserved, alpha = rng.random(n) < 0.2, float(rng.choice([0, 1, 4]))
        keep = int(rng.integers(max(1, reserved.sum()), n + 1))
        found = np.asarray(select(scores, prior, reserved, keep, alpha)).tolist()
        assert set(np.flatnonzero(reserved).tolist()) <= set(found), f"case {case}: a reserved token is gone"
        right = selection.select(scores, prior, reserved, keep, alpha).tolist()
        assert found == right, f"case {case}, alpha {alpha:g}: {found} in place of {right}"
