"""Local stride, grid prior and reserved tokens: equal in both twins and in the k-d tree."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fast.grid_prior
import fast.ops.nearest.grid
import reference.grid_prior
from parity_tests.cases import CASES, case_named
from parity_tests.compare import assert_equal
from parity_tests.test_clustering import token_sets
from reference.grid_prior import METRICS, grid_prior, local_stride, local_stride_kdtree, reserved_tokens


@pytest.fixture(autouse=True, scope="module")
def buckets_for_few_too():
    """Small sets go the way of large ones here."""
    with mock.patch.object(fast.ops.nearest.grid, "FEW_PAIRS", 0):
        yield


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_stride_and_prior_agree(case, metric, device):
    positions = case.positions()
    expected = np.stack([local_stride(p, metric) for p in positions])
    assert all((local_stride_kdtree(p, metric) == e).all() for p, e in zip(positions, expected, strict=True))
    tensors = torch.from_numpy(positions).to(device)
    stride = fast.grid_prior.local_stride(tensors, metric)
    assert_equal(stride, expected, name=f"local_stride {metric}")
    prior = np.stack([grid_prior(p, t) for p, t in zip(positions, expected, strict=True)])
    assert_equal(fast.grid_prior.grid_prior(tensors, stride), prior, name="grid_prior")


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reserved_tokens_agree(case, stage, device):
    positions = case.positions()
    expected = np.stack([reserved_tokens(p, stage) for p in positions])
    got = fast.grid_prior.reserved_tokens(torch.from_numpy(positions).to(device), stage)
    assert_equal(got, expected, name="reserved_tokens")


@given(token_sets(), st.sampled_from(METRICS))
def test_stride_is_the_smallest_power_of_two_that_reaches_the_nearest_token(example, metric):
    positions = example[0]
    stride = local_stride(positions, metric)
    assert (stride == fast.grid_prior.local_stride(torch.from_numpy(positions)[None], metric)[0].numpy()).all()
    assert (stride == local_stride_kdtree(positions, metric)).all()
    for i, t in enumerate(stride.tolist()):
        others = np.delete(positions, i, axis=0)
        assert t >= 1 and t & (t - 1) == 0
        if len(others):
            nearest = np.linalg.norm(others - positions[i], ord={"l2": 2, "l1": 1}[metric], axis=1).min()
            assert nearest <= t + 1e-9 and (t == 1 or t / 2 < nearest - 1e-9)


def test_worked_example():
    """Two tokens 3 apart: t = 4 for both, so g asks for multiples of 8; (1, 1) apart: L2 gives 2, so does L1."""
    positions = np.array([[8, 8], [11, 8]])
    stride = local_stride(positions)
    assert stride.tolist() == [4, 4] and grid_prior(positions, stride).tolist() == [1, 0]
    diagonal = np.array([[0, 0], [2, 3]])  # L2 3.6 -> 4; L1 5 -> 8
    assert local_stride(diagonal, "l2").tolist() == [4, 4] and local_stride(diagonal, "l1").tolist() == [8, 8]


def test_single_token_has_stride_one():
    assert local_stride(np.array([[5, 3]])).tolist() == [1]
    assert fast.grid_prior.local_stride(torch.tensor([[[5, 3]], [[0, 0]]])).tolist() == [[1], [1]]


def test_full_grid_has_stride_one_everywhere():
    y, x = np.indices((6, 9)).reshape(2, -1)
    positions = np.stack([x, y], axis=1)
    assert (local_stride(positions) == 1).all()
    assert grid_prior(positions, local_stride(positions)).sum() == 3 * 5  # even x, even y


@pytest.mark.parametrize("grid_size", [(8, 8), (9, 13), (7, 1), (33, 40)], ids=str)
def test_number_of_reserved_tokens(grid_size):
    y, x = np.indices(grid_size).reshape(2, -1)
    positions = np.stack([x, y], axis=1)
    for stage in (1, 2, 3):
        spacing = 2 ** (stage + 1)
        assert reserved_tokens(positions, stage).sum() == -(-grid_size[0] // spacing) * -(-grid_size[1] // spacing)


def test_result_does_not_depend_on_how_many_pairs_are_held_at_once(monkeypatch):
    case = case_named("shuffled")
    positions = torch.from_numpy(case.positions())
    whole = fast.grid_prior.local_stride(positions)
    monkeypatch.setattr(fast.ops.nearest.plain, "PAIRS_AT_ONCE", 7000)
    assert torch.equal(fast.grid_prior.local_stride(positions), whole)


def test_positions_are_left_as_they_were():
    positions = torch.from_numpy(CASES[3].positions())
    before = positions.clone()
    for metric in METRICS:
        fast.grid_prior.local_stride(positions, metric)
    assert torch.equal(positions, before)


def test_unknown_metric_gets_the_same_error_from_both():
    messages = []
    for twin, positions in ((reference.grid_prior, np.zeros((1, 2))), (fast.grid_prior, torch.zeros(1, 1, 2))):
        with pytest.raises(ValueError, match="metric must be one of l2, l1") as error:
            twin.local_stride(positions, "l3")
        messages.append(str(error.value))
    assert messages[0] == messages[1]
