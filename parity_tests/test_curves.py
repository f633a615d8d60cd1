"""Curves: the same ranks in both twins, and what makes each curve the curve that it is."""

import numpy as np
import pytest

import fast.curves
import reference.curves
from parity_tests.compare import assert_equal
from reference.curves import CURVES, curve_ranks

SIDES = range(1, 21)
DRAWN = {
    "scanline": [[0, 1, 2, 3], [7, 6, 5, 4], [8, 9, 10, 11], [15, 14, 13, 12]],
    "morton": [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]],
    "hilbert": [[0, 1, 14, 15], [3, 2, 13, 12], [4, 7, 8, 11], [5, 6, 9, 10]],
    "peano": [[0, 5, 6], [1, 4, 7], [2, 3, 8]],
}


def path(ranks):
    """The patches (iy, ix) in the order of the visit."""
    return np.stack(np.unravel_index(np.argsort(ranks, axis=None), ranks.shape), axis=1)


def block_spreads(ranks, side):
    """Highest minus lowest rank of each aligned block of side x side patches."""
    blocks = ranks.reshape(ranks.shape[0] // side, side, -1, side).transpose(0, 2, 1, 3).reshape(-1, side * side)
    return blocks.max(axis=1) - blocks.min(axis=1)


@pytest.mark.parametrize("curve", CURVES)
def test_twins_rank_every_rectangle_alike(curve, device):
    for nh in SIDES:
        for nw in SIDES:
            expected = curve_ranks(nh, nw, curve)
            assert_equal(fast.curves.curve_ranks(nh, nw, curve, device), expected, name=f"curve_ranks {curve}")


@pytest.mark.parametrize("shape", [(56, 37), (64, 64), (1, 130), (81, 81)], ids=str)
@pytest.mark.parametrize("curve", CURVES)
def test_twins_rank_large_rectangles_alike(curve, shape, device):
    assert_equal(
        fast.curves.curve_ranks(*shape, curve, device), curve_ranks(*shape, curve), name=f"curve_ranks {curve}"
    )


@pytest.mark.parametrize("curve", CURVES)
def test_a_curve_is_a_permutation_that_starts_at_the_top_left(curve):
    for nh in SIDES:
        for nw in SIDES:
            ranks = curve_ranks(nh, nw, curve)
            assert ranks.shape == (nh, nw) and ranks[0, 0] == 0
            assert sorted(ranks.ravel()) == list(range(nh * nw))


@pytest.mark.parametrize("curve", ["scanline", "hilbert", "peano"])
def test_consecutive_patches_share_an_edge(curve):
    for nh in SIDES:
        for nw in SIDES:
            steps = np.abs(np.diff(path(curve_ranks(nh, nw, curve)), axis=0)).sum(axis=1)
            assert (steps == 1).all(), (nh, nw)


def test_morton_jumps():
    steps = np.abs(np.diff(path(curve_ranks(4, 4, "morton")), axis=0)).sum(axis=1)
    assert steps.max() > 1


@pytest.mark.parametrize("curve", CURVES)
def test_curves_are_as_drawn(curve):
    assert curve_ranks(*np.shape(DRAWN[curve]), curve).tolist() == DRAWN[curve]


@pytest.mark.parametrize("curve, sides", [("hilbert", (2, 4, 8, 16)), ("morton", (2, 4, 8, 16)), ("peano", (3, 9, 27))])
def test_a_recursive_curve_finishes_each_aligned_block(curve, sides):
    whole = 2 * sides[-1] if curve != "peano" else 3 * sides[-1]
    ranks = curve_ranks(whole, whole, curve)
    for side in sides:
        assert (block_spreads(ranks, side) == side * side - 1).all()


def test_morton_keeps_the_order_of_the_square_that_holds_it():
    cut, ranks = curve_ranks(16, 16, "morton")[:7, :11], curve_ranks(7, 11, "morton")
    assert (np.argsort(cut, axis=None) == np.argsort(ranks, axis=None)).all()


@pytest.mark.parametrize("arguments", [(3, 3, "spiral"), (0, 3, "hilbert"), (3, -1, "scanline")], ids=str)
def test_bad_input_gets_the_same_error_from_both(arguments):
    messages = []
    for twin in (reference.curves, fast.curves):
        with pytest.raises(ValueError, match="curve") as error:
            twin.curve_ranks(*arguments)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
