"""Both twins reproduce the official networks: geometry element by element, features, scores and logits."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

import fast
import fast.clustering
import fast.grid_prior
import fast.neighborhoods
import fast.selection
import reference.backbone
from parity_tests.compare import assert_equal
from parity_tests.weights import golden_weights
from reference.clustering import balanced_clusters, cluster_sums
from reference.grid_prior import grid_prior, local_stride, local_stride_kdtree, reserved_tokens
from reference.neighborhoods import nearest_clusters, nearest_clusters_kdtree
from reference.selection import select

GOLDEN = Path(__file__).parent / "golden"
NETWORKS = sorted(path.stem for path in GOLDEN.glob("cls_*.npz"))
OPTIONS = {"nbhd_size": "neighborhood", "ds_rate": "rate", "reserve_on": "reserve"}  # the official names of ours
FIELDS = {"feat": "features", "score": "scores", "merged_feat": "merged_features"}


def geometry_cases():
    """{case: {name: array}} of the golden geometry."""
    with np.load(GOLDEN / "geometry.npz") as file:
        cases = {}
        for key in file.files:
            case, name = key.split("/")
            cases.setdefault(case, {})[name] = file[key]
    return cases


GEOMETRY = geometry_cases()


def parts(case):
    """Positions, grid_size and cluster size of a golden case."""
    golden = GEOMETRY[case]
    return (
        golden,
        golden["positions"].astype(np.int64),
        tuple(golden["canvas"].tolist()),
        int(golden["cluster_size"]),
    )


@pytest.mark.parametrize("case", GEOMETRY)
def test_reference_geometry(case):
    golden, positions, grid_size, m = parts(case)
    order, _ = balanced_clusters(positions, m, grid_size)
    assert (order == golden["order"]).all()
    sums, counts = cluster_sums(positions, order, m)
    for search in (nearest_clusters, nearest_clusters_kdtree):
        found = search(positions, sums, counts, golden["nearest_clusters"].shape[1])
        assert (found[order] == golden["nearest_clusters"]).all()
    for stride in (local_stride, local_stride_kdtree):
        assert (stride(positions, "l2") == golden["stride_l2"]).all()
        assert (stride(positions, "l1") == golden["stride_l1"]).all()


@pytest.mark.parametrize("case", GEOMETRY)
def test_fast_geometry(case, device):
    golden, positions, grid_size, m = parts(case)
    positions = torch.from_numpy(positions)[None].to(device)
    order, _ = fast.clustering.balanced_clusters(positions, m, grid_size)
    assert_equal(order[0], golden["order"].astype(np.int64), name="golden geometry: order")
    sums, counts = fast.clustering.cluster_sums(positions, order, m)
    wanted = golden["nearest_clusters"].astype(np.int64)
    found = fast.neighborhoods.nearest_clusters(positions, sums, counts, wanted.shape[1])
    assert_equal(found[0, order[0]], wanted, name="golden geometry: nearest clusters")
    for metric in ("l2", "l1"):
        stride = fast.grid_prior.local_stride(positions, metric)
        assert_equal(stride[0], golden[f"stride_{metric}"].astype(np.int64), name=f"golden geometry: {metric}")


@pytest.mark.parametrize("reserve", ["reserved", "free"])
@pytest.mark.parametrize("alpha", [0, 4])
@pytest.mark.parametrize("case", GEOMETRY)
def test_kept_tokens(case, alpha, reserve):
    golden, positions, _, _ = parts(case)
    raster = np.lexsort(positions.T)
    positions, scores = positions[raster], golden["scores"][raster]
    prior = grid_prior(positions, local_stride(positions))
    reserved = reserved_tokens(positions, int(golden["stage"])) & (reserve == "reserved")
    keep, wanted = int(len(positions) * float(golden["rate"])), golden[f"kept_alpha{alpha}_{reserve}"]
    assert (raster[select(scores, prior, reserved, keep, alpha)] == wanted).all()
    columns = (torch.from_numpy(column)[None] for column in (scores, prior, reserved))
    kept = torch.from_numpy(raster)[fast.selection.select(*columns, keep, alpha)[0]]
    assert_equal(kept, wanted.astype(np.int64), name="golden geometry: kept")


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    """A golden file, the model that it describes in evaluation, and the model's weights."""
    with np.load(GOLDEN / f"{request.param}.npz") as file:
        golden = dict(file)
    config = ast.literal_eval(str(golden.pop("config")))
    name = config.pop("name")
    model = fast.create_model(f"aff_{name}", **{OPTIONS.get(k, k): v for k, v in config.items()}).eval()
    weights = golden_weights(model)
    model.load_state_dict({key: torch.as_tensor(value) for key, value in weights.items()})
    return golden, model, weights


def check(golden, stages, logits, tolerance):
    """Compare with the stored float32: positions exactly, the rest relative to the largest value."""
    for index, stage in enumerate(stages):
        assert (np.asarray(stage["positions"]) == golden[f"stage{index}_pos"]).all()
        for short, field in FIELDS.items():
            if f"stage{index}_{short}" in golden:
                assert_close(stage[field], golden[f"stage{index}_{short}"], tolerance, f"stage {index + 1} {field}")
        if f"stage{index}_merged_pos" in golden:
            assert (np.asarray(stage["merged_positions"]) == golden[f"stage{index}_merged_pos"]).all()
    assert_close(logits, golden["logits"], tolerance, "logits")


def assert_close(got, wanted, tolerance, name):
    error = np.abs(np.asarray(got) - wanted).max() / np.abs(wanted).max()
    assert error <= tolerance, f"{name}: relative error {error:.2e}"


def test_reference_network(network):
    golden, model, weights = network
    config = reference.backbone.Config(**vars(model.config))
    images = np.moveaxis(golden["image"], 3, 1)
    results = [reference.backbone.forward(config, weights, image) for image in images]
    fields = ("positions", "merged_positions", *FIELDS.values())
    per_stage = [{f: [getattr(r[1][i], f) for r in results] for f in fields} for i in range(4)]
    stages = [{f: np.stack(v) for f, v in stage.items() if v[0] is not None} for stage in per_stage]
    check(golden, stages, np.stack([r[0] for r in results]), 1e-6)


@torch.no_grad()
def test_fast_network(network):
    golden, model, _ = network
    images = torch.from_numpy(golden["image"]).permute(0, 3, 1, 2)
    features, stages = model.forward_features(images, return_stages=True)
    check(golden, [vars(stage) for stage in stages], model.forward_head(features), 1e-4)
