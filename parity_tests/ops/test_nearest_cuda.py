"""The CUDA kernels of the geometry: their sources run on a CPU (and on a GPU where there is one) against the reference.

The launchers are the real ones; without a GPU only the launch itself is replaced, by a call into the same source,
compiled as plain C++.
"""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fast.ops.nearest.grid
import reference.grid_prior
import reference.neighborhoods
from fast.ops.nearest import cuda as neighbors
from fast.ops.nearest import cuda_launch as kernels
from fast.ops.support import cuda_unavailable
from parity_tests.cases import CASES, SMALL, case_named
from parity_tests.compare import assert_equal
from parity_tests.ops.cuda_on_cpu import COMPILER, Kernels
from parity_tests.test_clustering import token_sets
from reference.clustering import balanced_clusters, cluster_sums

WHY_NO_GPU = "no GPU" if not torch.cuda.is_available() else cuda_unavailable()
MACHINES = ["shim", pytest.param("gpu", marks=pytest.mark.skipif(WHY_NO_GPU is not None, reason=str(WHY_NO_GPU)))]
REAL = ("real", "whole")


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    """Return the kernels as plain C++."""
    return Kernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(params=MACHINES)
def machine(request, monkeypatch, shim):
    """Return the device to run the launchers on: a GPU, or the CPU with the launch replaced."""
    if request.param == "gpu":
        return "cuda"
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(kernels, "launch", shim.launch)
    return "cpu"


def check_tokens(machine, queries, positions, nearest):
    """Compare the nearest tokens of batches of queries and positions with the reference."""
    expected = [reference.neighborhoods.nearest_tokens(q, p, nearest) for q, p in zip(queries, positions, strict=True)]
    tensors = (torch.from_numpy(x).to(machine) for x in (queries, positions))
    assert_equal(neighbors.nearest_tokens(*tensors, nearest), np.stack(expected), name="cuda nearest_tokens")


def check_clusters(machine, positions, cluster_size, grid_size, nearest):
    """Compare the nearest clusters of a batch of positions with the reference."""
    sets = [cluster_sums(p, balanced_clusters(p, cluster_size, grid_size)[0], cluster_size) for p in positions]
    expected = [reference.neighborhoods.nearest_clusters(p, *s, nearest) for p, s in zip(positions, sets, strict=True)]
    arrays = positions, np.stack([sums for sums, _ in sets]), sets[0][1]
    found = neighbors.nearest_clusters(*(torch.from_numpy(x).to(machine) for x in arrays), nearest)
    assert_equal(found, np.stack(expected), name="cuda nearest_clusters")


def check_stride(machine, positions, metric):
    """Compare the local stride of a batch of positions with the reference."""
    expected = np.stack([reference.grid_prior.local_stride(p, metric) for p in positions])
    found = neighbors.local_stride(torch.from_numpy(positions).to(machine), metric)
    assert_equal(found, expected, name=f"cuda local_stride {metric}")


def crowded(rng):
    """Return (3, 420, 2): a full corner of 20 x 20 cells, and 20 tokens far away, in storage order by chance."""
    y, x = np.indices((20, 20)).reshape(2, -1)
    corner = np.stack([x, y], axis=1)
    far = [rng.choice(200 * 500, 20, replace=False) for _ in range(3)]
    images = [np.concatenate([corner, np.stack([30 + f % 500, 40 + f // 500], axis=1)]) for f in far]
    return np.stack([rng.permutation(image) for image in images])


@pytest.mark.parametrize("kind", REAL)
@pytest.mark.parametrize("nearest", [1, 4, 9])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_nearest_tokens_agree(case, nearest, kind, machine):
    queries = case.generator("queries").integers(-24, 240, (case.batch, 60, 2))
    check_tokens(machine, queries // 8 if kind == "whole" else queries / 8, case.positions(), nearest)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nearest_clusters_agree(case, machine):
    for nearest in (1, 6):
        check_clusters(machine, case.positions(), case.cluster_size, case.grid_size, nearest)


@pytest.mark.parametrize("metric", reference.grid_prior.METRICS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_local_stride_agrees(case, metric, machine):
    check_stride(machine, case.positions(), metric)


@pytest.mark.parametrize("grid_size", [(17, 40), (40, 17), (1, 300), (300, 1)], ids=str)
def test_cells_and_points_between_them_find_the_tokens_of_a_full_grid(grid_size, machine):
    y, x = np.indices(grid_size).reshape(2, -1)
    grid = np.stack([x, y], axis=1)[None]
    for queries in (grid, grid + 0.5, grid / 2 - 3):
        check_tokens(machine, queries, grid, 4)


def test_crowded_and_far_tokens_agree(machine):
    rng = np.random.default_rng(5)
    positions = crowded(rng)
    for nearest in (1, 9, neighbors.MOST_NEAREST):
        check_tokens(machine, rng.integers(-50, 600, (3, 80, 2)), positions, nearest)
        check_tokens(machine, rng.uniform(-50, 600, (3, 80, 2)), positions, nearest)
    check_clusters(machine, positions, 8, (240, 530), 6)
    check_clusters(machine, positions, 24, (240, 530), 6)
    for metric in reference.grid_prior.METRICS:
        check_stride(machine, positions, metric)


@pytest.mark.parametrize("machine", MACHINES[:1], indirect=True)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(example=token_sets(), seed=st.integers(0, 99))
def test_any_token_set_agrees(machine, example, seed):
    positions, grid_size, m, _ = example
    check_clusters(machine, positions[None], m, grid_size, 4)
    check_stride(machine, positions[None], "l2")
    queries = np.random.default_rng(seed).integers(-2, 30, (1, 20, 2))
    check_tokens(machine, queries, positions[None], 4)
    check_tokens(machine, queries / 2, positions[None], 4)


def test_queries_that_are_no_numbers_or_far_off_end_in_raster_order(machine):
    positions = case_named("shuffled").positions()[:1]
    far = [[np.nan, 3], [3, np.nan], [np.inf, 0], [0, -np.inf], [1e200, 1e200], [-1e300, 5], [1e17, 9], [2e9, -3e9]]
    with np.errstate(all="ignore"):
        check_tokens(machine, np.array([far]), positions, 4)


def test_queries_on_the_diagonal_tie_as_in_the_reference(machine):
    """(dx, dy) and (dy, dx) are equally far if every product is rounded, and are not with a fused multiply-add."""
    y, x = np.indices((12, 12)).reshape(2, -1)
    diagonal = np.random.default_rng(4).uniform(0, 11, (1, 200, 1)).repeat(2, axis=2)
    check_tokens(machine, diagonal, np.stack([x, y], axis=1)[None], 9)


def test_float32_queries_are_compared_in_float64(machine):
    case = case_named("batch_of_3")
    queries = case.normal("queries", 50, 2, dtype=torch.float32) * 9
    expected = neighbors.nearest_tokens(queries.double().to(machine), torch.from_numpy(case.positions()).to(machine), 4)
    found = neighbors.nearest_tokens(queries.to(machine), torch.from_numpy(case.positions()).to(machine), 4)
    assert torch.equal(found, expected)


def test_large_coordinates_agree(machine):
    rng = np.random.default_rng(8)
    positions = rng.integers(0, 2**29, (2, 50, 2)) - 2**28
    check_tokens(machine, rng.integers(-(2**28), 2**28, (2, 30, 2)), positions, 4)
    for metric in reference.grid_prior.METRICS:
        check_stride(machine, positions, metric)


def test_non_contiguous_expanded_and_tracked_inputs_give_the_same(machine):
    case = case_named("batch_of_3")
    positions = torch.from_numpy(case.positions()).to(machine)
    queries = case.normal("queries", 2, 40).to(machine).transpose(1, 2).requires_grad_()
    assert not queries.is_contiguous()
    found = neighbors.nearest_tokens(queries, positions, 4)
    assert torch.equal(found, neighbors.nearest_tokens(queries.detach().contiguous(), positions, 4))
    one = positions[:1].expand(3, -1, -1)
    assert torch.equal(neighbors.local_stride(one), neighbors.local_stride(one.contiguous()))
    wide = torch.cat([positions.flip(-1), positions.flip(-1)], dim=2)[..., 1:3]  # y, (x, y), x
    assert not wide.is_contiguous() and torch.equal(neighbors.local_stride(wide), neighbors.local_stride(positions))


def test_empty_batches_give_empty_results():
    none, some = torch.zeros(0, 9, 2, dtype=torch.int64), torch.zeros(2, 9, 2, dtype=torch.int64)
    assert neighbors.nearest_tokens(none, none, 4).shape == (0, 9, 4)
    assert neighbors.nearest_tokens(some[:, :0], some, 4).shape == (2, 0, 4)
    assert neighbors.nearest_tokens(some, some[:, :0], 4).shape == (2, 9, 0)
    assert neighbors.nearest_clusters(none, none[:, :2], torch.tensor([5, 4]), 2).shape == (0, 9, 2)
    assert neighbors.local_stride(none).shape == (0, 9) and neighbors.local_stride(some[:, :1]).tolist() == [[1], [1]]


def test_buckets_hold_every_point_once_in_its_place():
    for positions in (crowded(np.random.default_rng(2)), case_named("thin_row").positions()):
        points = torch.from_numpy(positions)
        batch, n = points.shape[:2]
        buckets = neighbors.bucket_grid(points)
        assert buckets.items.sort().values.tolist() == list(range(batch * n))
        assert torch.equal(points.flatten(0, 1)[buckets.items], buckets.points)
        most = (len(buckets.start) - 1) // batch
        for image, (x, y, side, across, down) in enumerate(buckets.grid.tolist()):
            assert across * down <= most
            for number in range(across * down):
                inside = buckets.points[buckets.start[image * most + number] : buckets.start[image * most + number + 1]]
                cell = torch.tensor([x + number % across * side, y + number // across * side])
                assert ((inside >= cell) & (inside < cell + side)).all()


def test_callers_know_how_many_the_kernels_keep():
    assert fast.ops.nearest.MOST_ON_GPU == neighbors.MOST_NEAREST


def test_wrong_input_is_refused():
    two, three = torch.zeros(2, 40, 2, dtype=torch.int64), torch.zeros(3, 40, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="33 are more than the 32 that the CUDA kernel keeps"):
        neighbors.nearest_tokens(two, two, 33)
    with pytest.raises(ValueError, match="one batch size and device, not 3 on cpu and 2 on cpu"):
        neighbors.nearest_tokens(three, two, 1)
    with pytest.raises(ValueError, match=r"positions must have shape \(B, number, 2\)"):
        neighbors.local_stride(two[0])
    with pytest.raises(ValueError, match="must be int64, not torch.int32"):
        neighbors.local_stride(two.int())
    huge = torch.zeros(1, 1, 2, dtype=torch.int64).expand(1, 2**31, 2)
    with pytest.raises(ValueError, match="2147483648 tokens in one batch are more than the 2147483647 of a launch"):
        neighbors.local_stride(huge)


def test_distances_beyond_int64_are_refused(machine):
    if machine == "cuda":
        pytest.skip("the device's own assertion would end the process")
    points = torch.tensor([[[0, 0], [2**30, 0]]])
    for call in (neighbors.local_stride, lambda p: neighbors.nearest_tokens(p, p, 1)):
        with pytest.raises(RuntimeError, match="squared distances exceed int64"):
            call(points)
    with pytest.raises(RuntimeError, match="queries so far off that squared distances exceed int64"):
        neighbors.nearest_tokens(points[:, 1:], points[:, :1], 1)
