"""The exercises of notebook 15: the answers pass the checks, what the notebook gives to start from does not."""

import importlib
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
EXERCISES = {  # check: the functions it takes
    "check_hilbert": ["hilbert"],
    "check_tie_rule": ["nearest"],
    "check_without_distance": ["expand", "near_me"],
    "check_select": ["select"],
}


@pytest.fixture(scope="module")
def room():
    """The checks and the answers, two modules beside the notebooks."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("exercises"), importlib.import_module("answers")
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def given():
    """The functions that the notebook gives to start from, by name."""
    cells = nbformat.read(FOLDER / "15_hands_on.ipynb", as_version=4).cells
    names = {"np": np}
    for cell in cells:
        if "exercise" in cell.metadata.get("tags", []):
            exec(cell.source, names)
    return names


@pytest.mark.parametrize("check", EXERCISES)
def test_answers_pass(room, check):
    exercises, answers = room
    getattr(exercises, check)(*(getattr(answers, name) for name in EXERCISES[check]))


@pytest.mark.parametrize("check", EXERCISES)
def test_what_is_given_fails(room, given, check, capsys):
    exercises, _ = room
    functions = [given[name] for name in EXERCISES[check]]
    with pytest.raises(AssertionError, match=r"\w"):
        getattr(exercises, check)(*functions)
    exercises.report(getattr(exercises, check), *functions)
    assert capsys.readouterr().out.startswith("not yet: ")


def test_every_check_is_an_exercise(room):
    assert {name for name in vars(room[0]) if name.startswith("check_")} == set(EXERCISES)


# Answers that are nearly right: each misses one thing that its check is there for.
def scanline(order):
    side = 2**order
    return [(x if y % 2 else side - 1 - x, side - 1 - y) for y in range(side) for x in range(side)][::-1]


def by_number(token, sums, counts, R):
    from reference.neighborhoods import scaled_distances

    return np.argsort(scaled_distances(np.array([token]), sums, counts)[0], kind="stable")[:R].tolist()


def no_reserve(scores, prior, reserved, keep, alpha):
    return np.sort(np.argsort(-(prior + alpha * scores), kind="stable")[:keep])


@pytest.mark.parametrize(
    "check, function, hint",
    [
        ("check_hilbert", scanline, "goes from|apart on the string"),
        ("check_tie_rule", by_number, "other numbers"),
        ("check_select", no_reserve, "reserved"),
    ],
)
def test_nearly_right_fails(room, check, function, hint):
    with pytest.raises(AssertionError, match=hint):
        getattr(room[0], check)(function)
