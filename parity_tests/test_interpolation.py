"""Shepard interpolation, and the nearest tokens that it reads: numbers, gradients, ties, places on and off tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fast.interpolation
import fast.neighborhoods
import fast.ops.nearest.grid
import reference.interpolation
from parity_tests import plain_heads
from parity_tests.cases import DTYPES, LOW, SMALL, TINY, case_named
from parity_tests.compare import GRADIENT, assert_equal, assert_layers, assert_parity
from parity_tests.gradients import assert_directional, assert_gradcheck, flat
from reference.neighborhoods import nearest_tokens

ODD, BATCH = case_named("odd_channels"), case_named("last_cluster_of_one")
QUERIES = 30


def places(case, dtype=torch.float64):
    """Points (B, q, 2) to read at, some of them tokens and some beyond the grid, and the nearest 4 tokens of each."""
    rng, positions = case.generator("places"), case.positions()
    h, w = case.grid_size
    points = rng.uniform(-3, [w + 3, h + 3], (case.batch, QUERIES, 2))
    own = rng.integers(0, case.n, (case.batch, 8))
    points[:, :8] = np.take_along_axis(positions, own[..., None], axis=1)
    points = torch.from_numpy(points).to(dtype)
    exact = points.double().numpy()
    return points, np.stack([nearest_tokens(q, p, 4) for q, p in zip(exact, positions, strict=True)])


@pytest.mark.parametrize("half_power", [3.0, 2.0, 0.7])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_shepard_weights_agree(case, dtype, half_power, device):
    points, nearest = places(case, dtype)
    neighbors = np.take_along_axis(case.positions()[:, None], nearest[..., None], axis=2)
    got = fast.interpolation.shepard_weights(points.to(device), torch.from_numpy(neighbors).to(device), half_power)
    oracle = reference.interpolation.shepard_weights(points.double().numpy(), neighbors, half_power)
    baseline = plain_heads.shepard_weights(points, neighbors, half_power)
    assert_parity(got, oracle, baseline, dtype, name="shepard_weights")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_shepard_agrees(case, dtype, device):
    points, nearest = places(case, dtype)
    positions, features = case.positions(), case.normal("f", case.n, case.dim, dtype=dtype)
    arguments = points, torch.from_numpy(positions), features, torch.from_numpy(nearest)
    got = fast.interpolation.shepard(*(x.to(device) for x in arguments))
    columns = points.double().numpy(), positions, features.double().numpy(), nearest
    oracle = [reference.interpolation.shepard(*c) for c in zip(*columns, strict=True)]
    columns = points, positions, features, nearest
    baseline = [plain_heads.shepard(*c, 3.0) for c in zip(*columns, strict=True)]
    assert_parity(got, np.stack(oracle), torch.stack(baseline), dtype, name="shepard")


def shepard_of(case, nearest):
    """``shepard`` of the twins as functions of a dict with points, features and half_power."""
    positions, names = case.positions(), ("points", "features")

    def ours(i):
        tensors = torch.from_numpy(positions), torch.from_numpy(nearest)
        return fast.interpolation.shepard(i["points"], tensors[0], i["features"], tensors[1], i["half_power"])

    def theirs(i, shepard=reference.interpolation.shepard):
        columns = zip(i[names[0]], positions, i[names[1]], nearest, strict=True)
        return [shepard(*c, i["half_power"]) for c in columns]

    return ours, theirs


def start_of(case, points, dtype=torch.float64):
    features = case.normal("f", case.n, case.dim, dtype=dtype)
    return {"points": points, "features": features, "half_power": torch.tensor([2.6], dtype=dtype)}


@pytest.mark.parametrize("case", [TINY, ODD, BATCH], ids=str)
def test_gradients_agree_with_central_differences_of_the_reference(case):
    """Also of the points and of the learnt power; not at a token's own place, where differences see the floor."""
    points, nearest = places(case)
    points, nearest = points[:, 8:], nearest[:, 8:]
    ours, theirs = shepard_of(case, nearest)
    grad_out = case.normal("grad_out", points.shape[1], case.dim)
    start = start_of(case, points)
    inputs = {name: value.clone().requires_grad_() for name, value in start.items()}
    ours(inputs).backward(grad_out)
    gradients = {name: value.grad for name, value in inputs.items()}
    at = {name: value.numpy() for name, value in start.items()}
    assert_directional(gradients, lambda i: np.stack(theirs(i)), at, grad_out.numpy(), name="shepard gradient")


@pytest.mark.parametrize("dtype", LOW[:1], ids=str)
@pytest.mark.parametrize("case", [TINY, ODD, BATCH], ids=str)
def test_every_element_of_the_gradients_agrees(case, dtype):
    points, nearest = places(case, dtype)
    ours, theirs = shepard_of(case, nearest)
    grad_out, start = case.normal("grad_out", QUERIES, case.dim, dtype=dtype), start_of(case, points, dtype)
    inputs = {name: value.clone().requires_grad_() for name, value in start.items()}
    ours(inputs).backward(grad_out)
    got = {name: value.grad for name, value in inputs.items()}
    references = [
        flat(start, lambda i: torch.stack(theirs(i, plain_heads.shepard)), grad_out, d) for d in (torch.float64, dtype)
    ]
    assert_layers(got, *references, dtype, GRADIENT, name="shepard gradient")


def test_gradcheck():
    points, nearest = places(TINY)
    ours, _ = shepard_of(TINY, nearest[:, 8:12])
    start = start_of(TINY, points[:, 8:12])
    assert_gradcheck(lambda p, f, a: ours({"points": p, "features": f, "half_power": a}), *start.values())


@pytest.mark.parametrize("half_power", [3.0, 1.0, 0.4])
def test_gradients_are_finite_at_a_tokens_own_place(half_power):
    points = torch.tensor([[[1.0, 0.0], [0.5, 0.0]]], requires_grad=True)
    positions, nearest = torch.tensor([[[0, 0], [1, 0]]]), torch.tensor([[[0, 1], [0, 1]]])
    features = torch.tensor([[[1.0], [3.0]]], requires_grad=True)
    power = torch.tensor([half_power], requires_grad=True)
    out = fast.interpolation.shepard(points, positions, features, nearest, power)
    out.square().sum().backward()
    assert all(value.grad.isfinite().all() for value in (points, features, power))


@pytest.mark.parametrize("twin", ["reference", "fast"])
def test_a_tokens_own_place_has_its_value_and_ties_share(twin):
    positions = np.array([[0, 0], [4, 0], [0, 4], [4, 4], [9, 9]])
    points, features = np.array([[4.0, 0.0], [2.0, 2.0], [2.0, -1.0]]), np.eye(5)
    nearest = nearest_tokens(points, positions, 4)
    assert nearest.tolist() == [[1, 0, 3, 2], [0, 1, 2, 3], [0, 1, 2, 3]]
    if twin == "fast":
        values = (torch.from_numpy(x)[None] for x in (points, positions, features, nearest))
        out = fast.interpolation.shepard(*values)[0].numpy()
    else:
        out = reference.interpolation.shepard(points, positions, features, nearest)
    np.testing.assert_allclose(out[0], [0, 1, 0, 0, 0], atol=1e-11)
    np.testing.assert_allclose(out[1], [0.25] * 4 + [0], atol=1e-15)
    share = 0.5 / (1 + (5 / 29) ** 3)  # 5 and 29: the squared distances of the two pairs
    np.testing.assert_allclose(out[2], [share, share, 0.5 - share, 0.5 - share, 0], atol=1e-12)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_weights_sum_to_one_however_far_the_point(case):
    far = torch.tensor([[-1e4, 3e4], [2.5e5, -1e5]]).expand(case.batch, -1, -1)
    positions = torch.from_numpy(case.positions())
    nearest = fast.neighborhoods.nearest_tokens(far, positions, 4)
    weights = fast.interpolation.shepard_weights(far, fast.neighborhoods.gather_rows(positions, nearest))
    assert weights.shape[-1] == min(4, case.n)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(far.shape[:2]))
    ones = torch.ones(case.batch, case.n, 1)
    torch.testing.assert_close(fast.interpolation.shepard(far, positions, ones, nearest), torch.ones(case.batch, 2, 1))


@st.composite
def sets_on_a_grid(draw):
    """Distinct cells in random storage order, cells to ask for, and a grid."""
    h, w = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    cells = draw(st.lists(st.integers(0, h * w - 1), min_size=1, max_size=50, unique=True))
    asked = draw(st.lists(st.integers(0, h * w - 1), min_size=1, max_size=20))
    positions, queries = (np.stack([np.array(c) % w, np.array(c) // w], axis=1) for c in (cells, asked))
    return queries, positions, (h, w)


@given(sets_on_a_grid(), st.integers(1, 12))
def test_search_ring_by_ring_equals_the_search_of_all(example, nearest):
    queries, positions, grid_size = example
    expected = nearest_tokens(queries, positions, nearest)
    tensors = torch.from_numpy(queries)[None], torch.from_numpy(positions)[None]
    for settings in ({}, {"grid_size": grid_size}):
        got = fast.neighborhoods.nearest_tokens(*tensors, nearest, **settings)[0]
        assert_equal(got, expected, name=f"nearest_tokens{' on a grid' if settings else ''}")


@given(sets_on_a_grid(), st.integers(1, 12), st.integers(-40, 90), st.integers(-40, 90))
def test_search_for_real_points_agrees(example, nearest, x, y):
    """Halves and quarters of a cell, full of ties, also outside the grid."""
    queries, positions, _ = example
    points = queries / 2 + np.array([x, y]) / 4
    expected = nearest_tokens(points, positions, nearest)
    got = fast.neighborhoods.nearest_tokens(torch.from_numpy(points)[None], torch.from_numpy(positions)[None], nearest)
    assert_equal(got[0], expected, name="nearest_tokens of real points")


@given(sets_on_a_grid(), st.integers(1, 5))
def test_no_nearer_token_is_left_out(example, nearest):
    queries, positions, _ = example
    for (x, y), row in zip(queries.tolist(), nearest_tokens(queries, positions, nearest).tolist(), strict=True):
        keys = [((px - x) ** 2 + (py - y) ** 2, py, px) for px, py in positions.tolist()]
        assert [keys[i] for i in row] == sorted(keys)[: len(row)]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_search_on_a_grid_agrees_on_batches(case, device, monkeypatch):
    positions = case.positions()
    expected = np.stack([nearest_tokens(p, p, 9) for p in positions])
    tensor = torch.from_numpy(positions).to(device)
    got = fast.neighborhoods.nearest_tokens(tensor, tensor, 9, case.grid_size)
    assert_equal(got, expected, name="nearest_tokens on a grid")
    monkeypatch.setattr(fast.ops.nearest.plain, "PAIRS_AT_ONCE", 40)
    assert torch.equal(fast.neighborhoods.nearest_tokens(tensor, tensor, 9, case.grid_size), got)
    real = fast.neighborhoods.nearest_tokens(tensor.double(), tensor, 9)
    assert_equal(real, expected, name="nearest_tokens of real points")
