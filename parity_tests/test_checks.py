"""Checks of arguments: what is refused, by which class, in one line, by both twins."""

import numpy as np
import pytest
import torch

import fast.checks
import reference.checks

TWINS = (reference.checks, fast.checks)


@pytest.mark.parametrize("checks", TWINS, ids=["reference", "fast"])
def test_numbers_and_how_values_are_shown(checks):
    assert [checks.is_whole(each) for each in (0, -3, 10**30, True, 1.0, "1", None)] == [True] * 3 + [False] * 4
    assert checks.is_number(1) and checks.is_number(-0.5) and not checks.is_number(True)
    assert not any(map(checks.is_number, (float("nan"), float("inf"), 10**400, "1", None, 1j)))
    assert checks.shown(np.zeros((2, 2))) == "array([[0., 0.], [0., 0.]])"
    assert checks.shown("x" * 1000) == f"'{'x' * 56}..." and checks.shown(10**5000) == "a number of many digits"


@pytest.mark.parametrize("checks", TWINS, ids=["reference", "fast"])
def test_sides_wholes_and_choices(checks):
    checks.check_sides("grid_size", (3, 4))
    checks.check_whole("k", 5, 1, 5)
    checks.check_number("alpha", 4)
    checks.check_choice("curve", "a", ("a", "b"))
    for odd, error in ((float("nan"), ValueError), (float("inf"), ValueError), ("1", TypeError), (True, TypeError)):
        with pytest.raises(error, match="^alpha must be a finite number, not "):
            checks.check_number("alpha", odd)
    for odd in (None, 3, (3,), (3, 4, 5), (3.0, 4), ("3", 4), (True, 4), np.array([3, 4])):
        with pytest.raises(TypeError, match="^grid_size must be two whole numbers, height and width, not "):
            checks.check_sides("grid_size", odd)
    for odd in ((0, 4), (4, -1), (10**5, 10**5)):
        with pytest.raises(ValueError, match=r"^grid_size must be at least 1 x 1, of at most 67,108,864 cells, not \("):
            checks.check_sides("grid_size", odd)
    for odd in (0, 6, 10**30):
        with pytest.raises(ValueError, match="^k must be from 1 to 5, not "):
            checks.check_whole("k", odd, 1, 5)
    with pytest.raises(ValueError, match="^curve must be one of a, b, not array"):
        checks.check_choice("curve", np.zeros(2), ("a", "b"))
    checks.check_indices("at", np.array([0, 2]) if checks is reference.checks else torch.tensor([0, 2]), 3)
    with pytest.raises(ValueError, match="^at must be from 0 to 1, not 0 to 2"):
        checks.check_indices("at", np.array([0, 2]) if checks is reference.checks else torch.tensor([0, 2]), 2)


@pytest.mark.parametrize("checks", TWINS, ids=["reference", "fast"])
def test_arrays(checks):
    def made(array):
        return torch.from_numpy(array) if checks is fast.checks else array

    cells, scores = made(np.zeros((5, 2), dtype=np.int64)), made(np.zeros(5))
    checks.check_arrays(cells=(cells, "whole", "n 2"), scores=(scores, "real", "n"), again=(cells, "whole", "... 2"))
    for array, numbers, axes, error, message in (
        (None, "whole", "n 2", TypeError, "must be an? .*not 'NoneType'"),
        ([[0, 0]], "whole", "n 2", TypeError, "must be an? .*not 'list'"),
        (scores, "whole", "n", TypeError, "must hold whole numbers, not .*float64"),
        (cells, "real", "n 2", TypeError, "must hold real numbers, not .*int64"),
        (cells, "whole", "n", ValueError, r"must have shape \(n\), not \(5, 2\)"),
        (cells, "whole", "n 3", ValueError, r"must have shape \(n, 3\), not \(5, 2\)"),
        (scores, "real", "... 2", ValueError, r"must have shape \(..., 2\), not \(5,\)"),
    ):
        with pytest.raises(error, match=f"^odd {message}"):
            checks.check_arrays(odd=(array, numbers, axes))
    with pytest.raises(ValueError, match=r"^b must have shape \(n, 2\) with n = 5, not \(4, 2\)"):
        checks.check_arrays(a=(scores, "real", "n"), b=(cells[:4], "whole", "n 2"))
