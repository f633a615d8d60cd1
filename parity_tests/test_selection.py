"""Importance, token counts and the choice: equal on scores full of ties, and no gradient through the choice."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fast.selection
import reference.selection
from parity_tests import plain
from parity_tests.cases import DTYPES, SMALL, case_named
from parity_tests.compare import assert_equal, assert_parity
from parity_tests.gradients import assert_directional, assert_gradcheck, backward
from parity_tests.weights import fill, tensors
from reference.selection import importance, select, token_counts


@st.composite
def choices(draw):
    """Scores of four values, a prior, reserved tokens, and a K that has room for them."""
    n = draw(st.integers(1, 40))
    column = st.lists(st.integers(0, 3), min_size=n, max_size=n).map(np.array)
    scores, prior, reserved = draw(column) / 4, (draw(column) > 1) * 1.0, draw(column) == 3
    keep = draw(st.integers(max(1, int(reserved.sum())), n))
    return scores, prior, reserved, keep, draw(st.sampled_from([0.0, 1.0, 4.0, 8.0]))


def fast_select(scores, prior, reserved, keep, alpha, device="cpu"):
    columns = (torch.from_numpy(np.asarray(c))[None].to(device) for c in (scores, prior, reserved))
    return fast.selection.select(*columns, keep, alpha)[0]


@given(choices())
def test_twins_choose_the_same(example):
    assert_equal(fast_select(*example), select(*example), name="select")


@given(choices())
def test_choice_is_the_best_there_is(example):
    scores, prior, reserved, keep, alpha = example
    kept = select(*example)
    assert len(kept) == keep and (np.diff(kept) > 0).all()
    assert set(np.flatnonzero(reserved)) <= set(kept)
    rank = sorted(range(len(scores)), key=lambda i: (not reserved[i], -(prior[i] + alpha * scores[i]), i))
    assert kept.tolist() == sorted(rank[:keep])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_scores_of_any_dtype_are_summed_in_float64(dtype, device):
    rng = np.random.default_rng(3)
    scores = torch.from_numpy(0.5 + rng.random(500) * 1e-3).to(dtype)
    prior, reserved = (rng.random(500) < 0.25) * 1.0, np.zeros(500, dtype=bool)
    expected = select(scores.double().numpy(), prior, reserved, 125, 4.0)
    columns = (x.to(device)[None] for x in (scores, torch.from_numpy(prior), torch.from_numpy(reserved)))
    assert_equal(fast.selection.select(*columns, 125, 4.0)[0], expected, name="select")


def test_sums_that_float32_cannot_tell_apart_still_order_tokens():
    """Scores a unit in the last place of float32 apart: 1 + 4 s would lose that unit."""
    scores = (0.25 + (np.arange(63) * 5 % 7) * 2.0**-25).astype(np.float32)
    prior, reserved = np.ones(63), np.zeros(63, dtype=bool)
    for keep in range(1, 64):
        rank = sorted(range(63), key=lambda i: (-scores[i], i))
        expected = np.array(sorted(rank[:keep]))
        assert (select(scores, prior, reserved, keep, 4.0) == expected).all()
        assert_equal(fast_select(scores, prior, reserved, keep, 4.0), expected, name="select")


@pytest.mark.parametrize("twin", [select, fast_select], ids=["reference", "fast"])
@pytest.mark.parametrize("keep, reserved", [(0, 0), (6, 0), (2, 3)])
def test_impossible_keep_is_refused(twin, keep, reserved):
    with pytest.raises(ValueError, match="keep"):
        twin(np.zeros(5), np.zeros(5), np.arange(5) < reserved, keep, 4.0)


def test_choice_has_no_gradient():
    scores = torch.rand(2, 9, requires_grad=True)
    kept = fast.selection.select(scores, torch.zeros(2, 9), torch.zeros(2, 9, dtype=torch.bool), 4, 4.0)
    assert not kept.is_floating_point() and not kept.requires_grad


@given(st.integers(8, 70), st.integers(8, 70), st.integers(1, 100), st.booleans())
def test_token_counts_agree_and_a_refused_rate_names_one_that_works(h, w, percent, reserve):
    results = []
    for twin in (reference.selection, fast.selection):
        try:
            results.append(twin.token_counts((h, w), percent / 100, reserve))
        except ValueError as error:
            results.append(str(error))
    assert results[0] == results[1]
    if isinstance(results[0], str):
        assert "stage " in results[0] and "K = " in results[0]
        suggested = float(results[0].rsplit(">= ", 1)[1])
        token_counts((h, w), suggested, reserve)
        with pytest.raises(ValueError):
            token_counts((h, w), suggested - 2e-4, reserve)


def test_token_counts_truncate_a_float64_product():
    assert token_counts((56, 56), 0.25) == [3136, 784, 196, 49]
    assert token_counts((56, 56), 0.2, reserve=False) == [3136, 627, 125, 25]
    assert token_counts((10, 10), 0.29, reserve=False, stages=2) == [100, 28]  # 100 * 0.29 is 28.999999999999996
    assert token_counts((8, 8), 1.0) == [64, 64, 64, 64]


@pytest.mark.parametrize("rate", [0, -0.1, 1.01, float("nan")])
@pytest.mark.parametrize("twin", [reference.selection, fast.selection], ids=["reference", "fast"])
def test_rate_outside_its_range_is_refused(twin, rate):
    with pytest.raises(ValueError, match=r"rate must be in \(0, 1\]"):
        twin.token_counts((8, 8), rate)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_importance_agrees(case, dtype, device):
    """From bfloat16 features the score is still a float32 one: choices hang on its digits."""
    module = fast.selection.Importance(case.dim)
    weights = fill(module, seed=1, dtype=dtype)
    features, wide = case.normal("features", case.n, case.dim, dtype=dtype), torch.promote_types(dtype, torch.float32)
    got = module.to(device=device, dtype=wide)(features.to(device))
    expected = np.stack([importance(f, weights) for f in features.double().numpy()])
    baseline = torch.stack([plain.importance(f, tensors(weights, wide)) for f in features.to(wide)])
    assert_parity(got, expected, baseline, wide, name="importance")


def test_importance_stays_in_float32_under_autocast():
    module = fast.selection.Importance(8)
    fill(module)
    features = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        inside = module(features)
    assert inside.dtype == torch.float32 and torch.equal(inside, module(features))


def test_gradient_of_importance_agrees_with_central_differences_of_the_reference():
    case = case_named("odd_channels")
    module = fast.selection.Importance(case.dim).double()
    weights = fill(module, seed=1, dtype=torch.float64)
    inputs, grad_out = {"features": case.normal("features", case.n, case.dim)}, case.normal("grad_out", case.n)
    gradients = backward(module, inputs, lambda i: module(i["features"]), grad_out)
    assert_directional(
        gradients,
        lambda i: np.stack([importance(f, i) for f in i["features"]]),
        {"features": inputs["features"].numpy(), **weights},
        grad_out.numpy(),
        name="importance gradient",
    )
    assert_gradcheck(lambda f: module(f), inputs["features"][:, :5])
