"""Nearest clusters, nearest tokens and local stride by every path: equal to comparing all, to the last tie."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fast.clustering import cluster_sums, cluster_tokens
from fast.ops import dispatch, local_stride, nearest_clusters, nearest_tokens
from fast.ops.nearest import grid
from parity_tests.cases import SMALL
from parity_tests.ops.test_nearest import cells, uneven

PATHS = [p for p in dispatch.PATHS["nearest"][:-1] if dispatch.why_not("nearest", p, "cpu") is None]
NUMBERS = [1, 2, 4, 6, 7, 9, 32, 33, 2000]  # of neighbours: unrolled ones, others in lanes, those of a heap, all


@pytest.fixture(params=PATHS)
def path(request):
    """Every path that runs here but the plain one."""
    return request.param


def by(path, function, *arguments):
    with dispatch.force(nearest=path), mock.patch.object(grid, "FEW_PAIRS", 0):
        return function(*arguments)


def assert_same(path, function, *arguments):
    """The path's result equals that of comparing all, and the arguments stay as they are."""
    tensors = [x for x in arguments if torch.is_tensor(x)]
    before = [x.clone() for x in tensors]
    found, expected = by(path, function, *arguments), by("plain", function, *arguments)
    assert found.dtype == torch.int64 and found.shape == expected.shape and torch.equal(found, expected)
    torch.testing.assert_close(tensors, before, rtol=0, atol=0, equal_nan=True)


def shuffled(items, seed=0):
    return items[:, torch.randperm(items.shape[1], generator=torch.Generator().manual_seed(seed))]


def sets():
    """Token sets (B, n, 2) full of ties: full grids, a crowd in a corner, lines, points with large gaps."""
    full = cells(24, 33)[None]
    return {
        "full": full,
        "spaced": 4 * full,
        "shuffled": shuffled(full),
        "crowded": uneven(),
        "row": cells(1, 300)[None],
        "column": cells(300, 1)[None],
        "negative": full - 17,
        "far_groups": torch.cat([full, full + 100_000], dim=1),
        "two_images": torch.cat([shuffled(full, 1), 3 * full.flip(1)]),
    }


@pytest.mark.parametrize("nearest", NUMBERS)
@pytest.mark.parametrize("name", sets())
def test_nearest_tokens(name, nearest, path):
    items = sets()[name]
    for queries in (items[:, ::7], 2 * items[:, ::9] - 5):
        assert_same(path, nearest_tokens, queries, items, nearest)


@pytest.mark.parametrize("nearest", [1, 9, 33])
@pytest.mark.parametrize("name", sets())
def test_nearest_tokens_of_real_points(name, nearest, path):
    items = sets()[name]
    corners = items[:, ::7] + 0.5  # as far from four cells
    odd = torch.tensor([[[torch.nan, 1], [torch.inf, -torch.inf], [1e300, -3.25]]], dtype=torch.float64)
    for queries in (corners, corners.float() / 3, odd.expand(len(items), -1, -1)):
        assert_same(path, nearest_tokens, queries, items, nearest)


@pytest.mark.parametrize("metric", ["l2", "l1"])
@pytest.mark.parametrize("name", sets())
def test_local_stride(name, metric, path):
    assert_same(path, local_stride, sets()[name], metric)


@pytest.mark.parametrize("nearest", [1, 4, 6, 9, 40])
@pytest.mark.parametrize("m", [1, 7, 8, 50])
@pytest.mark.parametrize("name", ["full", "shuffled", "crowded", "two_images"])
def test_nearest_clusters(name, m, nearest, path):
    items = sets()[name]
    clusters = cluster_tokens(items, m, (160, 160))
    _, counts = cluster_sums(items, clusters.order, m)
    assert_same(path, nearest_clusters, items, clusters.sums, counts, nearest)


@given(
    st.lists(st.tuples(st.integers(-40, 40), st.integers(-40, 40)), min_size=1, max_size=150, unique=True),
    st.lists(st.tuples(st.integers(-90, 90), st.integers(-90, 90)), min_size=1, max_size=40),
    st.sampled_from(NUMBERS),
)
def test_anywhere(items, queries, nearest):
    items, queries = torch.tensor([items]), torch.tensor([queries])
    for path in PATHS:
        assert_same(path, nearest_tokens, queries, items, nearest)
        assert_same(path, nearest_tokens, queries / 2, items, nearest)
        assert_same(path, local_stride, items, "l1")


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_every_case(case, path):
    positions = torch.from_numpy(case.positions())
    assert_same(path, nearest_tokens, positions, positions, 9)
    assert_same(path, local_stride, positions)


@pytest.mark.parametrize("nearest", [1, 6, 33])
def test_coordinates_whose_keys_a_double_cannot_hold(nearest, path):
    """Squared distance and number together need more than 53 bits; the lowest bits decide."""
    items = torch.cat([cells(9, 9), cells(9, 9) + 2**26])[None]
    assert_same(path, nearest_tokens, torch.tensor([[[2**25 + 4, 2**25 + 4], [2**25 + 5, 2**25 + 4]]]), items, nearest)
    assert_same(path, nearest_tokens, items + 2**25, items, nearest)
    assert_same(path, local_stride, 2**22 * cells(9, 9)[None], "l2")


def test_distances_beyond_int64_are_refused(path):
    with pytest.raises(ValueError, match="too large for exact integers"):
        by(path, nearest_tokens, torch.tensor([[[2**32, 0]]]), torch.tensor([[[0, 0], [2**32, 2**32]]]), 2)


def test_strides_do_not_matter(path):
    items = sets()["two_images"]
    turned = items.transpose(1, 2).contiguous().transpose(1, 2)
    assert_same(path, nearest_tokens, turned[:, ::3], turned, 5)
    assert_same(path, nearest_tokens, turned[:, ::3] / 2, turned, 5)
    assert_same(path, local_stride, turned)
    shared = items[:1].expand(3, -1, -1)
    assert_same(path, nearest_tokens, shared, shared, 5)


@pytest.mark.parametrize("batch, q", [(0, 5), (2, 0), (2, 1)])
def test_few_queries_and_single_tokens(batch, q, path):
    items = sets()["full"].expand(batch, -1, -1)
    assert_same(path, nearest_tokens, items[:, :q], items, 3)
    assert_same(path, nearest_tokens, items[:, :q], items[:, 9:10], 3)
    assert_same(path, local_stride, items[:, :1])
    if batch == 0:
        assert_same(path, local_stride, items)


def test_the_same_bits_for_any_number_of_threads(path):
    items, results = uneven(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found = [by(path, nearest_tokens, q, items, k) for q in (items, items / 3) for k in (6, 40)]
        results.append([*found, by(path, local_stride, items)])
    torch.set_num_threads(1)
    assert all(map(torch.equal, results[0], results[1])) and all(map(torch.equal, results[0], results[2]))
