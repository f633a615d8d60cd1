"""Cluster order and choice by every path: equal to the definition to the last tie, whatever the input looks like."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fast.clustering
import reference.clustering
from fast.curves import CURVES, curve_ranks
from fast.ops import choose, cluster_tokens, dispatch
from fast.ops.ordering import plain
from parity_tests.cases import CASES, Case, case_named
from parity_tests.compare import assert_equal

PATHS = [path for path in dispatch.PATHS["ordering"] if dispatch.why_not("ordering", path, "cpu") is None]
HUGE = 2**31 - 1


@pytest.fixture(params=PATHS)
def path(request):
    """Every path that runs here, forced."""
    with dispatch.force(ordering=request.param):
        yield request.param


def ranks_for(n, cluster_size, grid_size, curve="scanline"):
    return curve_ranks(*fast.clustering.patch_grid(n, cluster_size, grid_size), curve)


def clusters_by(path, positions, cluster_size, grid_size, curve="scanline"):
    """Clusters by a path, of positions (B, n, 2)."""
    with dispatch.force(ordering=path):
        return fast.clustering.cluster_tokens(positions, cluster_size, grid_size, curve)


def assert_same(found, expected):
    for name, a, b in zip(expected._fields, found, expected, strict=True):
        assert a.dtype == torch.int64 and torch.equal(a, b), name


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_clusters_equal_the_reference_on_every_case(case, curve, path):
    positions, m = case.positions(), case.cluster_size
    found = fast.clustering.cluster_tokens(torch.from_numpy(positions), m, case.grid_size, curve)
    pairs = [reference.clustering.balanced_clusters(p, m, case.grid_size, curve) for p in positions]
    orders = np.stack([order for order, _ in pairs])
    assert_equal(found.order, orders, name=f"cluster_tokens {path}: order")
    assert_equal(found.cluster, np.stack([cluster for _, cluster in pairs]), name=f"cluster_tokens {path}: cluster")
    assert_equal(found.place, orders.argsort(axis=1), name=f"cluster_tokens {path}: place")
    sums = [reference.clustering.cluster_sums(p, o, m)[0] for p, o in zip(positions, orders, strict=True)]
    assert_equal(found.sums, np.stack(sums), name=f"cluster_tokens {path}: S")
    members = found.members.flatten(1)
    assert torch.equal(members[:, : case.n], found.order) and (members[:, case.n :] == -1).all()


@st.composite
def token_sets(draw):
    """Positions (1, n, 2) in any storage order, cluster size, grid size."""
    h, w = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    cells = draw(st.permutations(range(h * w)))[: draw(st.integers(1, h * w))]
    positions = torch.tensor([[(cell % w, cell // w) for cell in cells]])
    return positions, draw(st.integers(1, 30)), (h, w), draw(st.sampled_from(CURVES))


@given(token_sets())
def test_paths_agree_anywhere(example):
    for path in PATHS:
        assert_same(clusters_by(path, *example), clusters_by("plain", *example))


@pytest.mark.parametrize("grid_size", [(HUGE, HUGE), (3, 2**20), (2**20, 1)])
def test_huge_coordinates(grid_size, path):
    """Distances that wrap around in int64, and grids with many more rows or columns than tokens."""
    rng = np.random.default_rng(0)
    x, y = (rng.integers(0, side, (2, 60)) for side in grid_size[::-1])
    positions = torch.from_numpy(np.stack([x, y], axis=-1))
    assert_same(clusters_by(path, positions, 8, grid_size), clusters_by("plain", positions, 8, grid_size))


def test_ratios_that_float32_cannot_tell_apart_still_order_tokens(path):
    cells = torch.randperm(2**22, generator=torch.Generator().manual_seed(0))[:20_000]
    positions = torch.stack([cells % 2048, cells // 2048], dim=-1)[None]
    _, ratio = plain.anchor_ratio(positions, ranks_for(20_000, 4000, (2048, 2048)), (2048, 2048))
    assert len(ratio.unique()) > len(ratio.float().unique())
    assert_same(clusters_by(path, positions, 4000, (2048, 2048)), clusters_by("plain", positions, 4000, (2048, 2048)))


def test_a_crowded_patch():
    """A thousand tokens in one patch, few elsewhere, in reverse storage order."""
    y, x = (cells.flatten() for cells in torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij"))
    positions = torch.cat([torch.stack([x, y], dim=-1), torch.tensor([[500, 3], [40, 500]])]).flip(0)[None]
    expected = clusters_by("plain", positions, 8, (512, 512))
    for path in PATHS:
        assert_same(clusters_by(path, positions, 8, (512, 512)), expected)


def test_strides_do_not_matter_and_inputs_stay(path):
    case = case_named("batch_of_3")
    positions, ranks = torch.from_numpy(case.positions()), ranks_for(case.n, 8, case.grid_size, "hilbert")
    turned, turned_ranks = positions.transpose(1, 2).contiguous().transpose(1, 2), ranks.t().contiguous().t()
    before = turned.clone(), turned_ranks.clone()
    expected = plain.cluster_tokens(positions, ranks, 8, case.grid_size)
    found = cluster_tokens(turned, turned_ranks, 8, case.grid_size)
    assert all(map(torch.equal, found, expected)) and torch.equal(turned, before[0])
    assert torch.equal(turned_ranks, before[1])
    one = cluster_tokens(positions[1:2].expand(2, -1, -1), ranks, 8, case.grid_size)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(one, expected, strict=True))


@pytest.mark.parametrize("m", [1, 8])
def test_one_token_and_no_image(m, path):
    found = fast.clustering.cluster_tokens(torch.tensor([[[3, 2]]]), m, (4, 4))
    assert [x.tolist() for x in found] == [[[0]], [[0]], [[0]], [[[0] + [-1] * (m - 1)]], [[[3, 2]]]]
    nothing = fast.clustering.cluster_tokens(torch.empty(0, 5, 2, dtype=torch.int64), m, (4, 4))
    shapes = [(0, 5)] * 3 + [(0, -(-5 // m), m), (0, -(-5 // m), 2)]
    assert [tuple(x.shape) for x in nothing] == shapes


@pytest.mark.skipif("cpu" not in PATHS, reason="needs a compiler")
@pytest.mark.parametrize("token", [(-1, 0), (6, 0), (0, 4), (0, -(2**62)), (2**62, 1)])
def test_the_kernel_refuses_tokens_off_the_grid(token):
    positions = torch.tensor([[[0, 0], token, [5, 3]]])
    with pytest.raises(ValueError, match="[xy] of positions must be from 0 to [35], not "):
        clusters_by("cpu", positions, 2, (4, 6))
    with dispatch.force(ordering="cpu"), pytest.raises(ValueError, match="1 tokens are off the grid h, w = 4, 6"):
        cluster_tokens(positions, ranks_for(3, 2, (4, 6)), 2, (4, 6))


def chosen_by_definition(values, keep):
    return [sorted(sorted(range(len(row)), key=lambda i: (-row[i], i))[:keep]) for row in values.tolist()]


@given(st.lists(st.sampled_from([-2.5, -1.0, 0.0, 1e-300, 0.5, 1.0, 4.0, np.inf, -np.inf]), min_size=1, max_size=60))
def test_choice_equals_the_definition_for_every_keep(column):
    values = torch.tensor([column, column[::-1]], dtype=torch.float64)
    for path in PATHS:
        with dispatch.force(ordering=path):
            for keep in range(1, len(column) + 1):
                assert choose(values, keep).tolist() == chosen_by_definition(values, keep), (path, keep)


@pytest.mark.parametrize("keep", [1, 700, 1024, 4096])
def test_choice_among_many_ties(keep, path):
    values = torch.from_numpy(np.random.default_rng(1).integers(0, 9, (3, 4096)) / 3)
    turned = values.t().contiguous().t()
    found = choose(turned, keep)
    assert found.tolist() == chosen_by_definition(values, keep) and torch.equal(turned, values)
    assert choose(values[:0], keep).shape == (0, keep)


def test_zeros_are_equal_and_what_is_no_number_comes_first(path):
    values = torch.tensor([[0.0, -0.0, -1, torch.inf, -torch.nan, 0, torch.nan, 5]], dtype=torch.float64)
    assert [choose(values, keep).tolist()[0] for keep in (1, 2, 3, 6)] == [[4], [4, 6], [3, 4, 6], [0, 1, 3, 4, 6, 7]]


def test_the_same_bits_for_any_number_of_threads(path):
    case = Case("threads", (96, 120), 6000, batch=2, shuffled=True)
    positions, value = torch.from_numpy(case.positions()), case.normal("value", 6000)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append([*fast.clustering.cluster_tokens(positions, 3, case.grid_size), choose(value, 1500)])
    torch.set_num_threads(1)
    assert all(map(torch.equal, results[0], results[1])) and all(map(torch.equal, results[0], results[2]))


def test_operators_pass_torchs_own_checks(path):
    case = case_named("last_cluster_of_one")
    positions = torch.from_numpy(case.positions())
    arguments = positions, ranks_for(case.n, 8, case.grid_size), 8, *case.grid_size, path
    torch.library.opcheck(torch.ops.aff.cluster_tokens.default, arguments)
    if path != "plain":
        torch.library.opcheck(torch.ops.aff.choose.default, (case.normal("value", case.n), 7, path))


def test_choice_compiles_to_one_graph(path):
    value = torch.from_numpy(np.random.default_rng(2).integers(0, 5, (2, 40)) / 2)
    compiled = torch.compile(lambda v: choose(2 * v, 9) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(value), plain.choose(value, 9) + 1)
