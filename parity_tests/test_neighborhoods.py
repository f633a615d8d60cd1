"""Nearest clusters and neighbourhoods: equal in both twins and in the k-d tree, and none nearer left out."""

from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fast.neighborhoods
import fast.ops.nearest.grid
import reference.neighborhoods
from parity_tests.cases import CASES, SMALL, case_named
from parity_tests.compare import assert_equal, assert_parity
from parity_tests.plain import relative_position
from parity_tests.test_clustering import token_sets
from reference.clustering import balanced_clusters, cluster_sums
from reference.neighborhoods import nearest_clusters, nearest_clusters_kdtree, nearest_count, nearest_tokens


@pytest.fixture(autouse=True, scope="module")
def buckets_for_few_too():
    """Small sets go the way of large ones here."""
    with mock.patch.object(fast.ops.nearest.grid, "FEW_PAIRS", 0):
        yield


def clusters_of(positions, m, grid_size, curve="scanline"):
    return cluster_sums(positions, balanced_clusters(positions, m, grid_size, curve)[0], m)


def fast_nearest(positions, sums, counts, nearest, device="cpu"):
    tensors = (torch.from_numpy(x).to(device) for x in (positions[None], sums[None], counts))
    return fast.neighborhoods.nearest_clusters(*tensors, nearest)[0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nearest_clusters_of_twins_and_tree_agree(case, device):
    for positions in case.positions():
        sums, counts = clusters_of(positions, case.cluster_size, case.grid_size)
        nearest = nearest_count(case.neighborhood, case.cluster_size, len(counts))
        expected = nearest_clusters(positions, sums, counts, nearest)
        assert (nearest_clusters_kdtree(positions, sums, counts, nearest) == expected).all()
        assert_equal(fast_nearest(positions, sums, counts, nearest, device), expected, name="nearest_clusters")


@given(token_sets(), st.integers(1, 12))
def test_nearest_clusters_agree_on_any_token_set(example, nearest):
    positions, grid_size, m, curve = example
    sums, counts = clusters_of(positions, m, grid_size, curve)
    expected = nearest_clusters(positions, sums, counts, nearest)
    assert expected.shape == (len(positions), min(nearest, len(counts)))
    assert (nearest_clusters_kdtree(positions, sums, counts, nearest) == expected).all()
    assert_equal(fast_nearest(positions, sums, counts, nearest), expected, name="nearest_clusters")


@given(token_sets(most=25), st.integers(1, 5))
def test_no_nearer_cluster_is_left_out(example, nearest):
    positions, grid_size, m, curve = example
    sums, counts = clusters_of(positions, m, grid_size, curve)
    found = nearest_clusters(positions, sums, counts, nearest)
    centres = [(Fraction(int(s[0]), int(c)), Fraction(int(s[1]), int(c))) for s, c in zip(sums, counts, strict=True)]
    for (x, y), row in zip(positions.tolist(), found.tolist(), strict=True):
        rank = sorted(range(len(centres)), key=lambda j: ((x - centres[j][0]) ** 2 + (y - centres[j][1]) ** 2, j))
        assert row == rank[: len(row)]


def test_full_grid_holds_ties_that_decide_who_is_a_neighbour():
    case = case_named("full_56x56")
    positions = case.positions()[0]
    sums, counts = clusters_of(positions, 8, case.grid_size)
    distances = np.sort(reference.neighborhoods.scaled_distances(positions, sums, counts), axis=1)
    assert (distances[:, 5] == distances[:, 6]).sum() > 10  # the last of the R = 6 and the first left out


@pytest.mark.parametrize("module", [reference.neighborhoods, fast.neighborhoods], ids=["reference", "fast"])
def test_nearest_count_rounds_half_to_even_within_bounds(module):
    counts = [(48, 8, 392), (20, 8, 9), (28, 8, 9), (3, 8, 9), (4, 8, 9), (12, 8, 9), (48, 8, 3), (144, 24, 99)]
    assert [module.nearest_count(*c) for c in counts] == [6, 2, 4, 1, 1, 2, 3, 6]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stage_geometry_agrees(case, device):
    got, expected = case.fast_geometry(torch.float64, device), case.reference_geometry()
    for field in ("order", "cluster", "neighbors"):
        wanted = np.stack([getattr(e, field) for e in expected])
        assert_equal(getattr(got, field), wanted, name=f"stage_geometry: {field}")
    valid = torch.ones_like(got.neighbors, dtype=torch.bool) if got.valid is None else got.valid
    assert_equal(valid, np.stack([e.valid for e in expected]), name="stage_geometry: valid")
    relative = np.stack([e.relative for e in expected])
    offsets = np.stack([p[e.neighbors] - p[:, None] for p, e in zip(case.positions(), expected, strict=True)])
    plain = relative_position(offsets, torch.float64)
    assert_parity(got.relative, relative, plain, torch.float64, name="stage_geometry: relative")


@pytest.mark.parametrize("curve", ["hilbert", "peano", "morton"])
def test_stage_geometry_agrees_on_other_curves(curve):
    case = case_named("batch_of_3")
    positions = case.positions()
    got = fast.neighborhoods.stage_geometry(torch.from_numpy(positions), 8, 24, case.grid_size, curve)
    expected = [reference.neighborhoods.stage_geometry(p, 8, 24, case.grid_size, curve) for p in positions]
    assert_equal(got.neighbors, np.stack([e.neighbors for e in expected]), name=f"stage_geometry: {curve}")


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_neighbourhood_is_all_tokens_of_the_nearest_clusters(case):
    for positions, geometry in zip(case.positions(), case.reference_geometry(), strict=True):
        assert not geometry.neighbors[~geometry.valid].any()
        sums, counts = clusters_of(positions, case.cluster_size, case.grid_size)
        nearest = nearest_clusters(
            positions, sums, counts, nearest_count(case.neighborhood, case.cluster_size, len(counts))
        )
        for i in range(case.n):
            members = (
                np.isin(geometry.cluster, nearest[i]) if case.neighborhood < case.n else np.ones(case.n, dtype=bool)
            )
            seen = geometry.neighbors[i][geometry.valid[i]]
            assert sorted(seen) == np.flatnonzero(members).tolist()


@pytest.mark.parametrize("neighborhood, slots", [(47, 48), (48, 48), (49, 48), (30, 32)])
def test_neighbourhood_of_n_is_global(neighborhood, slots):
    case = case_named("n_is_neighbourhood")
    geometry = reference.neighborhoods.stage_geometry(case.positions()[0], 8, neighborhood, case.grid_size)
    assert geometry.neighbors.shape == (48, slots)
    if neighborhood >= 48:
        assert (geometry.neighbors == np.arange(48)).all() and geometry.valid.all()


@pytest.mark.parametrize("nearest", [1, 4, 1000])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_nearest_tokens_agree(case, nearest, device):
    positions = case.positions()
    queries = case.generator("queries").integers(-3, 30, (case.batch, 40, 2))
    expected = np.stack([nearest_tokens(q, p, nearest) for q, p in zip(queries, positions, strict=True)])
    assert expected.shape[2] == min(nearest, case.n)
    tensors = (torch.from_numpy(x).to(device) for x in (queries, positions))
    assert_equal(fast.neighborhoods.nearest_tokens(*tensors, nearest), expected, name="nearest_tokens")


def test_result_does_not_depend_on_how_many_pairs_are_held_at_once(monkeypatch):
    case = case_named("last_cluster_of_one")
    whole = case.fast_geometry()
    monkeypatch.setattr(fast.ops.nearest.plain, "PAIRS_AT_ONCE", 50)
    assert torch.equal(case.fast_geometry().neighbors, whole.neighbors)


def test_batch_does_not_matter():
    case = case_named("shuffled")
    whole, positions = case.fast_geometry(), torch.from_numpy(case.positions())
    for i in range(case.batch):
        alone = fast.neighborhoods.stage_geometry(positions[i : i + 1], 8, case.neighborhood, case.grid_size)
        for field in ("order", "cluster", "neighbors", "relative"):
            assert torch.equal(getattr(alone, field)[0], getattr(whole, field)[i])


def test_distances_beyond_int64_are_refused():
    points = torch.tensor([[[0, 0], [2**31, 0]]])
    with pytest.raises(ValueError, match="too large for exact integers"):
        fast.neighborhoods.nearest_tokens(points, points, 1)


@pytest.mark.parametrize("rows", [1, 5])
def test_gather_rows_is_indexing(rows):
    rng = np.random.default_rng(rows)
    x, index = rng.standard_normal((2, 3, 7, 4)), rng.integers(0, 7, (3, rows, 5))
    got = fast.neighborhoods.gather_rows(torch.from_numpy(x), torch.from_numpy(index), 1)
    expected = np.stack([np.stack([x[a, b][index[b]] for b in range(3)]) for a in range(2)])
    assert (got.numpy() == expected).all()
