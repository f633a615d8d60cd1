"""Expanded relative position: equal numbers, and the invariances that make it worth having."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fast.position
from parity_tests import plain
from parity_tests.cases import DTYPES, SMALL
from parity_tests.compare import assert_parity
from reference.position import relative_position

offsets = st.lists(st.tuples(st.integers(-60, 60), st.integers(-60, 60)), min_size=1, max_size=20).map(np.array)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_twins_agree(case, dtype, device):
    positions = case.positions()
    gap = positions[:, None] - positions[:, :, None]  # at most 40 cells: exact in every dtype
    fast_result = fast.position.relative_position(torch.from_numpy(gap).to(device), dtype)
    assert_parity(
        fast_result, relative_position(gap), plain.relative_position(gap, dtype), dtype, name="relative_position"
    )


@given(offsets)
def test_distance_sine_and_cosine_are_what_they_are_called(offset):
    dx, dy, distance, sine, cosine = relative_position(offset).T
    angle = np.arctan2(offset[:, 1], offset[:, 0])
    away = distance > 0
    assert (dx == offset[:, 0]).all() and (dy == offset[:, 1]).all()
    np.testing.assert_allclose(distance, np.hypot(dx, dy), rtol=1e-15)
    np.testing.assert_allclose(sine[away], np.sin(angle[away]), atol=1e-15)
    np.testing.assert_allclose(cosine[away], np.cos(angle[away]), atol=1e-15)
    assert not sine[~away].any() and not cosine[~away].any()


@given(offsets, st.sampled_from([2, 4, 0.5]))
def test_scale_changes_neither_sine_nor_cosine(offset, scale):
    once, scaled = relative_position(offset), relative_position(offset * scale)
    assert (once[:, :3] * scale == scaled[:, :3]).all()
    assert (once[:, 3:] == scaled[:, 3:]).all()


@given(offsets)
def test_rotation_by_a_right_angle_turns_only_the_direction(offset):
    once, turned = relative_position(offset), relative_position(np.stack([-offset[:, 1], offset[:, 0]], axis=1))
    assert (once[:, 2] == turned[:, 2]).all()
    assert (turned[:, 3] == once[:, 4]).all() and (turned[:, 4] == -once[:, 3]).all()


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64, torch.float64], ids=str)
def test_a_token_seen_from_itself_is_all_zeros(dtype):
    assert not fast.position.relative_position(torch.zeros(2, 3, 2, dtype=dtype)).any()
    assert not relative_position(np.zeros((3, 2))).any()


def test_distances_beyond_256_keep_their_digits_in_float32():
    got = fast.position.relative_position(torch.tensor([[301, 0], [0, 999]]))
    assert got.dtype == torch.float32 and got[:, 2].tolist() == [301.0, 999.0]
