"""The search through buckets: the same as comparing all, however the items are spread, at linear cost."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fast.clustering
import fast.grid_prior
import fast.neighborhoods
import reference.neighborhoods
from fast.ops import dispatch
from fast.ops.nearest import grid, plain
from fast.ops.nearest.grid import nearest_by_buckets, nearest_items
from fast.ops.nearest.plain import nearest_of_all
from parity_tests.cases import CASES, case_named
from parity_tests.compare import assert_equal
from parity_tests.test_neighborhoods import clusters_of
from reference.patch_embedding import grid_positions


def assert_same(points, items, nearest, metric="l2"):
    got, expected = (search(points, items, nearest, metric) for search in (nearest_by_buckets, nearest_of_all))
    for name, a, b in zip(("number", "squared"), got, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), f"{name} of {metric}, {nearest} nearest"


def cells(h, w):
    return torch.from_numpy(grid_positions((h, w))).long()


def uneven(seed=0, grid_size=(96, 160), corner=40, others=150):
    """A full square in one corner and few tokens elsewhere, as when everything happens in one place: (1, n, 2)."""
    rng, all_cells = np.random.default_rng(seed), cells(*grid_size)
    crowded = (all_cells < corner).all(dim=1)
    apart = all_cells[~crowded][torch.from_numpy(rng.permutation(int((~crowded).sum()))[:others])]
    return torch.cat([all_cells[crowded], apart])[None]


@pytest.mark.parametrize("nearest", [1, 9, 1000])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_buckets_equal_reference_on_every_case(case, nearest, device):
    positions = case.positions()[:, :900]
    raster = np.stack([p[np.lexsort(p.T)] for p in positions])
    expected = np.stack([reference.neighborhoods.nearest_tokens(p, p, nearest) for p in raster])
    tensor = torch.from_numpy(raster).to(device)
    got, _ = nearest_by_buckets(tensor, tensor, nearest)
    assert_equal(got, expected, name="nearest_by_buckets")
    got, _ = nearest_by_buckets(tensor.double(), tensor, nearest)
    assert_equal(got, expected, name="nearest_by_buckets of real points")


@pytest.mark.parametrize("metric", ["l2", "l1"])
@pytest.mark.parametrize("nearest", [1, 2, 4, 6, 9])
def test_full_grid_full_of_ties(nearest, metric):
    grid = cells(20, 31)
    assert_same(grid[None] * 2 + 1, grid[None] * 2, nearest, metric)  # each between four cells
    assert_same(
        grid[None], grid[torch.randperm(620, generator=torch.Generator().manual_seed(1))][None], nearest, metric
    )


@pytest.mark.parametrize("metric", ["l2", "l1"])
@pytest.mark.parametrize("nearest", [2, 6, 40])
def test_crowded_here_and_sparse_there(nearest, metric):
    items = uneven()
    assert_same(items, items, nearest, metric)
    assert_same(cells(96, 160)[None, ::7], items, nearest, metric)  # most of them far from the crowd
    assert_same(cells(96, 160)[None, ::7], items[:, :1600], nearest, metric)  # the crowd alone
    batch = torch.cat([items, cells(96, 160)[None, :1750]])  # two images of different spread
    assert_same(batch, batch, nearest, metric)


def test_centres_of_crowded_clusters():
    positions = uneven(3)[0].numpy()
    for m in (7, 8, 24):
        sums, counts = clusters_of(positions, m, (96, 160))
        expected = reference.neighborhoods.nearest_clusters(positions, sums, counts, 6)
        scale = np.lcm.reduce(counts)
        points, centres = torch.from_numpy(positions * scale), torch.from_numpy(sums * (scale // counts)[:, None])
        assert_equal(nearest_by_buckets(points[None], centres[None], 6)[0][0], expected, name=f"clusters of {m}")


places = st.tuples(st.integers(-30, 60), st.integers(-30, 60))


@given(st.lists(places, min_size=1, max_size=60), st.lists(places, min_size=1, max_size=20), st.integers(1, 12))
def test_no_nearer_one_is_left_out(items, points, nearest):
    """Anywhere, also several at one place; the definition written in Python's integers."""
    tensors = torch.tensor([points]), torch.tensor([items])
    for metric, norm in (("l2", lambda x, y: x * x + y * y), ("l1", lambda x, y: (abs(x) + abs(y)) ** 2)):
        number, squared = (t[0].tolist() for t in nearest_by_buckets(*tensors, nearest, metric))
        for (x, y), found, distances in zip(points, number, squared, strict=True):
            rank = sorted((norm(x - a, y - b), i) for i, (a, b) in enumerate(items))[:nearest]
            assert list(zip(distances, found, strict=True)) == rank


reals = st.tuples(*[st.integers(-200, 400).map(lambda v: v / 8) | st.floats(-1e6, 1e6, width=32)] * 2)


@given(st.lists(places, min_size=1, max_size=60), st.lists(reals, min_size=1, max_size=20), st.integers(1, 12))
def test_real_points_anywhere(items, points, nearest):
    assert_same(torch.tensor([points], dtype=torch.float64), torch.tensor([items]), nearest)


def test_points_that_are_no_numbers_get_some_items():
    points = torch.tensor([[[torch.nan, 1], [torch.inf, 2], [-1e30, 5e20], [3e38, -torch.inf]]])
    assert_same(points, cells(30, 30)[None], 3)
    assert nearest_by_buckets(points, cells(30, 30)[None], 3)[0].amax() < 900


def test_far_apart_is_exact_as_long_as_neighbours_are_near():
    """The range of the whole is beyond what comparing all pairs in int64 can do; that of neighbours is not."""
    items = (cells(40, 40) * 2**22)[None]
    points = items[:, ::9] + torch.tensor([2**21, 2**21 - 1])
    expected, _ = nearest_of_all(items[:, ::9] // 2**21 * 8 + torch.tensor([8, 7]), items // 2**21 * 8, 4)
    assert torch.equal(nearest_by_buckets(points, items, 4)[0], expected)
    with pytest.raises(ValueError, match="too large for exact integers"):
        nearest_of_all(points, items, 4)


@pytest.mark.parametrize("search", [nearest_by_buckets, nearest_of_all])
def test_distances_beyond_int64_are_refused(search):
    with pytest.raises(ValueError, match="distances of [0-9]+ units among 2 items are too large for exact integers"):
        search(torch.tensor([[[2**31, 2**31]]]), torch.tensor([[[0, 0], [2**31, 0]]]), 2)


@pytest.mark.parametrize("search", [nearest_by_buckets, nearest_of_all, nearest_items])
@pytest.mark.parametrize("batch, q", [(0, 5), (2, 0)])
def test_nothing_asked_nothing_found(search, batch, q):
    items = cells(4, 6).expand(batch, -1, -1)
    for points in (items[:, :q], items[:, :q] / 2):
        number, squared = search(points, items, 3)
        assert number.shape == squared.shape == (batch, q, 3) and squared.dtype == points.to(squared.dtype).dtype
        assert number.dtype == torch.int64


@pytest.mark.parametrize("pairs", [1, 50, 4000])
def test_slices_do_not_matter(pairs, monkeypatch):
    items = uneven(grid_size=(30, 40), corner=12, others=30)
    whole = nearest_by_buckets(items, items, 5)
    monkeypatch.setattr(plain, "PAIRS_AT_ONCE", pairs)
    for search in (nearest_by_buckets, nearest_of_all):
        assert all(torch.equal(a, b) for a, b in zip(search(items, items, 5), whole, strict=True))


@pytest.mark.parametrize("name", ["shuffled", "batch_of_3"])
def test_forced_paths_agree(name):
    case = case_named(name)
    positions = torch.from_numpy(case.positions())
    order, _ = fast.clustering.cluster_order(positions, 8, case.grid_size)
    results = []
    for path in [path for path in dispatch.PATHS["nearest"] if dispatch.why_not("nearest", path, "cpu") is None]:
        with dispatch.force(nearest=path), mock.patch.object(grid, "FEW_PAIRS", 0):
            clusters = fast.neighborhoods.nearest_clusters(
                positions, *fast.clustering.cluster_sums(positions, order, 8), 6
            )
            tokens = [fast.neighborhoods.nearest_tokens(positions, positions, 9, c) for c in (None, case.grid_size)]
            results.append([clusters, *tokens, *(fast.grid_prior.local_stride(positions, m) for m in ("l2", "l1"))])
    assert len(results) >= 2 and torch.equal(results[0][1], results[0][2])
    for found in results[:-1]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[-1], strict=True))


def test_few_are_compared_with_all_and_many_are_not():
    for items, few in ((cells(10, 10), True), (cells(40, 40), False)):
        with mock.patch.object(grid, "nearest_of_all", side_effect=nearest_of_all) as brute:
            nearest_items(items[None], items[None], 2)
        assert brute.called == few


def test_operators_pass_torchs_own_checks():
    positions = torch.from_numpy(case_named("batch_of_3").positions())
    order, _ = fast.clustering.cluster_order(positions, 8, (16, 16))
    sums, counts = fast.clustering.cluster_sums(positions, order, 8)
    torch.library.opcheck(torch.ops.aff.nearest_clusters.default, (positions, sums, counts, 3))
    for queries, width in ((positions, None), (positions[:, ::2] / 2, 16)):
        torch.library.opcheck(torch.ops.aff.nearest_tokens.default, (queries, positions, 4, width))
    torch.library.opcheck(torch.ops.aff.local_stride.default, (positions, "l2"))


@pytest.mark.parametrize("nearest", [2, 6])
def test_cost_grows_with_the_number_of_items(nearest):
    """Pairs compared for one item, on token sets of one kind, eight times as many: at most 1.5 times as many."""
    each = []
    for grid_size in ((64, 64), (128, 256)):
        tokens = uneven(grid_size=grid_size, corner=grid_size[0] // 4, others=grid_size[0] * grid_size[1] // 8)
        with mock.patch.object(grid, "squared_distances", side_effect=plain.squared_distances) as squared:
            nearest_by_buckets(tokens, tokens, nearest)
        each.append(sum(len(call.args[0]) for call in squared.call_args_list) / tokens.shape[1])
    assert each[1] <= 1.5 * each[0] and each[1] < 60
