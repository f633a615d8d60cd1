"""Balanced clustering: the same order to the last tie, and what a balanced clustering must be."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fast.clustering
import reference.clustering
from parity_tests.cases import CASES
from parity_tests.compare import assert_equal
from reference.clustering import anchor_ratio, balanced_clusters, cluster_sums, patch_grid
from reference.curves import CURVES, curve_ranks


@st.composite
def token_sets(draw, most=60):
    """Distinct positions in random storage order, a grid, a cluster size and a curve."""
    h, w = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    cells = draw(st.lists(st.integers(0, h * w - 1), min_size=1, max_size=most, unique=True))
    positions = np.stack([np.array(cells) % w, np.array(cells) // w], axis=1)
    return positions, (h, w), draw(st.integers(1, 9)), draw(st.sampled_from(CURVES))


def fast_clusters(positions, *arguments, device="cpu"):
    return fast.clustering.balanced_clusters(torch.from_numpy(positions).to(device), *arguments)


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_twins_agree(case, curve, device):
    positions = case.positions()
    order, cluster = fast_clusters(positions, case.cluster_size, case.grid_size, curve, device=device)
    expected = [balanced_clusters(p, case.cluster_size, case.grid_size, curve) for p in positions]
    assert_equal(order, np.stack([e[0] for e in expected]), name=f"balanced_clusters {curve}: order")
    assert_equal(cluster, np.stack([e[1] for e in expected]), name=f"balanced_clusters {curve}: cluster")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_twins_agree_on_the_parts(case, device):
    positions, m = case.positions(), case.cluster_size
    grid = patch_grid(case.n, m, case.grid_size)
    assert fast.clustering.patch_grid(case.n, m, case.grid_size) == grid
    ranks = curve_ranks(*grid)
    tensors = torch.from_numpy(positions).to(device)
    got = fast.clustering.anchor_ratio(tensors, torch.from_numpy(ranks).to(device), case.grid_size)
    for name, values, wanted in zip(
        ("rank", "ratio"),
        got,
        zip(*(anchor_ratio(p, ranks, case.grid_size) for p in positions), strict=True),
        strict=True,
    ):
        assert_equal(values, np.stack(wanted), name=f"anchor_ratio: {name}")
    orders = np.stack([balanced_clusters(p, m, case.grid_size)[0] for p in positions])
    sums, counts = fast.clustering.cluster_sums(tensors, torch.from_numpy(orders).to(device), m)
    expected = [cluster_sums(p, order, m) for p, order in zip(positions, orders, strict=True)]
    assert_equal(sums, np.stack([e[0] for e in expected]), name="cluster_sums: S")
    assert_equal(counts, expected[0][1], name="cluster_sums: c")


@pytest.mark.parametrize("curve", CURVES)
def test_twins_agree_on_a_grid_of_1024(curve):
    rng = np.random.default_rng(5)
    cells = rng.choice(1024 * 1024, 4000, replace=False)
    positions = np.stack([cells % 1024, cells // 1024], axis=1)
    order, _ = fast_clusters(positions[None], 8, (1024, 1024), curve)
    ranks = curve_ranks(22, 22, curve)
    got = fast.clustering.anchor_ratio(torch.from_numpy(positions)[None], torch.from_numpy(ranks), (1024, 1024))
    assert_equal(got[1][0], anchor_ratio(positions, ranks, (1024, 1024))[1], name="anchor_ratio: ratio")
    assert_equal(order[0], balanced_clusters(positions, 8, (1024, 1024), curve)[0], name=f"balanced_clusters {curve}")


def test_ratios_that_float32_cannot_tell_apart_still_order_tokens():
    """On a full grid cut into a few large patches, some pairs of a patch differ in r^2 by less than float32 shows."""
    y, x = np.indices((173, 191)).reshape(2, -1)
    positions, m = np.stack([x, y], axis=1), 8300
    order, _ = balanced_clusters(positions, m, (173, 191))
    patch, ratio = anchor_ratio(positions, curve_ranks(*patch_grid(len(x), m, (173, 191))), (173, 191))
    rounded = np.lexsort((x, y, ratio.astype(np.float32), patch))
    assert (order != rounded).any()
    assert_equal(fast_clusters(positions[None], m, (173, 191))[0][0], order, name="balanced_clusters scanline: order")


@pytest.mark.parametrize("h", [88, 98, 110, 154])
def test_patch_of_a_token_is_found_in_integers(h):
    positions, wrong_in_floats = np.stack([np.zeros(h, dtype=np.int64), np.arange(h)], axis=1), 0
    for nh in range(1, h + 1):
        ranks = np.arange(nh)[:, None]
        expected = [y * nh // h for y in range(h)]
        wrong_in_floats += sum(int(y * (nh / h)) != e for y, e in enumerate(expected))
        got = fast.clustering.anchor_ratio(torch.from_numpy(positions)[None], torch.from_numpy(ranks), (h, 1))[0][0]
        assert got.tolist() == anchor_ratio(positions, ranks, (h, 1))[0].tolist() == expected
    assert wrong_in_floats > 0


@given(token_sets())
def test_twins_agree_on_any_token_set(example):
    positions, grid_size, m, curve = example
    order, cluster = fast_clusters(positions[None], m, grid_size, curve)
    expected = balanced_clusters(positions, m, grid_size, curve)
    assert_equal(order[0], expected[0], name=f"balanced_clusters {curve}: order")
    assert_equal(cluster[0], expected[1], name=f"balanced_clusters {curve}: cluster")


@given(token_sets())
def test_each_token_is_in_one_cluster_and_all_but_the_last_are_full(example):
    positions, grid_size, m, curve = example
    order, cluster = balanced_clusters(positions, m, grid_size, curve)
    assert sorted(order) == list(range(len(positions)))
    sizes = np.bincount(cluster)
    assert (sizes[:-1] == m).all() and 1 <= sizes[-1] <= m
    assert (cluster[order] == np.arange(len(positions)) // m).all()


@given(token_sets(), st.randoms(use_true_random=False))
def test_storage_order_does_not_matter(example, random):
    positions, grid_size, m, curve = example
    shuffle = list(range(len(positions)))
    random.shuffle(shuffle)
    for clusters in (balanced_clusters, lambda p, *rest: tuple(x[0].numpy() for x in fast_clusters(p[None], *rest))):
        order, cluster = clusters(positions, m, grid_size, curve)
        order2, cluster2 = clusters(positions[shuffle], m, grid_size, curve)
        assert (positions[order] == positions[shuffle][order2]).all()
        assert (cluster[shuffle] == cluster2).all()


@given(token_sets())
def test_centres_come_from_exact_sums(example):
    positions, grid_size, m, curve = example
    order, cluster = balanced_clusters(positions, m, grid_size, curve)
    sums, counts = cluster_sums(positions, order, m)
    for j in range(len(counts)):
        assert counts[j] == (cluster == j).sum()
        assert (sums[j] == positions[cluster == j].sum(axis=0)).all()


def test_four_by_four_by_hand():
    """2 x 2 patches visited clockwise; in the first, r^2 is 5/13 for x = 0 and 13/5 for x = 1, ties by raster."""
    y, x = np.indices((4, 4)).reshape(2, -1)
    order, _ = balanced_clusters(np.stack([x, y], axis=1), 4, (4, 4))
    #  tokens   0  1  2  3     patches  0 1
    #           4  5  6  7              3 2
    #           8  9 10 11
    #          12 13 14 15
    assert order.tolist()[:4] == [0, 4, 1, 5]
    assert [sorted(run) for run in order.reshape(4, 4).tolist()] == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [10, 11, 14, 15],
        [8, 9, 12, 13],
    ]


def test_patches_are_about_as_many_as_clusters():
    assert patch_grid(3136, 8, (56, 56)) == (20, 20)
    assert patch_grid(7, 8, (56, 56)) == (1, 1)
    assert patch_grid(40, 8, (1, 40)) == (1, 14)


BAD = {
    "duplicate": ([[1, 1], [2, 0], [1, 1]], 2, (4, 4), "scanline", ValueError, "more than one token.*\\(1, 1\\)"),
    "off_grid": ([[1, 1], [4, 0]], 2, (4, 4), "scanline", ValueError, "positions: .* off the grid.*\\(4, 0\\)"),
    "negative": ([[0, -1]], 2, (4, 4), "scanline", ValueError, "off the grid"),
    "floats": ([[0.0, 1.0]], 2, (4, 4), "scanline", TypeError, "positions must be integers"),
    "three_columns": ([[0, 1, 2]], 2, (4, 4), "scanline", ValueError, "positions must have shape"),
    "cluster_size": ([[0, 1]], 0, (4, 4), "scanline", ValueError, "cluster_size"),
    "curve": ([[0, 1]], 2, (4, 4), "zigzag", ValueError, "curve must be one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_the_same_error_from_both(name):
    positions, m, grid_size, curve, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        balanced_clusters(np.array(positions), m, grid_size, curve)
    with pytest.raises(kind, match=message):
        fast_clusters(np.array([positions]), m, grid_size, curve)


def test_no_tokens_are_refused_by_both():
    with pytest.raises(ValueError, match="n >= 1"):
        balanced_clusters(np.empty((0, 2), dtype=np.int64), 8, (4, 4))
    with pytest.raises(ValueError, match="n >= 1"):
        fast.clustering.balanced_clusters(torch.empty(2, 0, 2, dtype=torch.int64), 8, (4, 4))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.uint8], ids=str)
def test_any_integer_dtype_will_do(dtype):
    positions = CASES[3].positions()
    order, _ = fast.clustering.balanced_clusters(torch.from_numpy(positions).to(dtype), 8, CASES[3].grid_size)
    expected, _ = reference.clustering.balanced_clusters(positions[0].astype(np.int32), 8, CASES[3].grid_size)
    assert_equal(order[0], expected, name="balanced_clusters scanline: order")
