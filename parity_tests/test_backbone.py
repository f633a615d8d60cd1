"""The whole backbone: twins end to end, stage by stage under the reference's choice, and how many choices flip."""

import contextlib

import numpy as np
import pytest
import torch

import fast
import fast.neighborhoods
import reference.backbone
from parity_tests import plain
from parity_tests.cases import DTYPES
from parity_tests.compare import assert_equal, assert_layers, count_equal
from parity_tests.gradients import assert_directional, backward
from parity_tests.weights import fill, tensors
from reference.layers import subset
from reference.neighborhoods import stage_geometry
from reference.patch_embedding import grid_positions, patch_embedding, prepare_image

SETTINGS = {
    "nano": {},
    "other_rate": {"rate": 0.37, "alpha": 8.0, "num_classes": 3},
    "free_l1_hilbert": {"reserve": False, "stride_metric": "l1", "curve": "hilbert"},
    "layer_scale_global": {"layer_scale": 1.0, "neighborhood": (48, 10**6, 16, 49), "cluster_size": 6},
    "keep_all": {"rate": 1.0, "curve": "peano"},
}
DISCRETE = ("positions", "order", "cluster", "kept", "merged_positions")
CONTINUOUS = ("features", "scores", "merged_features")
ALLOWED_FLIPS = {torch.float64: 0.0, torch.float32: 0.01, torch.bfloat16: 0.15}  # share of the tokens chosen


def twins(settings, dtype=torch.float32):
    """A nano model in evaluation, the reference's Config, and the weights, all non-trivial."""
    model = fast.create_model("aff_nano", **{"num_classes": 7, **settings}).eval()
    weights = fill(model, seed=7, dtype=dtype)
    return model, reference.backbone.Config(**vars(model.config)), weights


def pictures(height, width, batch=2):
    """Coarse tiles under noise, normalised, float64 (B, 3, H, W)."""
    rng = np.random.default_rng(8)
    tiles = rng.standard_normal((batch, 3, -(-height // 8), -(-width // 8))).repeat(8, axis=2).repeat(8, axis=3)
    return tiles[..., :height, :width] + 0.5 * rng.standard_normal((batch, 3, height, width))


def precision(dtype):
    """How a model runs in a dtype: as it is, or under autocast."""
    return torch.autocast("cpu", dtype) if dtype == torch.bfloat16 else contextlib.nullcontext()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("height, width", [(64, 64), (33, 47), (48, 100)])
def test_twins_agree_end_to_end_in_float64(name, height, width):
    model, config, weights = twins({"rate": 0.31, **SETTINGS[name]})
    batch = pictures(height, width)
    with torch.no_grad():
        features, stages = model.double().forward_features(torch.from_numpy(batch), return_stages=True)
        logits = model.forward_head(features)
    expected = [reference.backbone.forward(config, weights, image) for image in batch]
    for index, got in enumerate(stages):
        merges = index < 3
        wanted = {f: [getattr(e[1][index], f) for e in expected] for f in (*DISCRETE, *CONTINUOUS)}
        for field in DISCRETE[: 5 if merges else 3]:
            assert_equal(getattr(got, field), np.stack(wanted[field]), name=f"backbone: stage {index + 1} {field}")
        for field in CONTINUOUS[: 3 if merges else 1]:
            np.testing.assert_allclose(getattr(got, field), np.stack(wanted[field]), rtol=1e-9, atol=1e-10)
        assert merges or got.kept is got.scores is got.merged_features is got.merged_positions is None
    np.testing.assert_allclose(logits, np.stack([e[0] for e in expected]), rtol=1e-9, atol=1e-10)


def plain_stage(features, oracle, geometry, weights, config, index):
    """The baseline of one stage, under the reference's choice."""
    for block in range(config.depths[index]):
        features = plain.attention_block(features, geometry, subset(weights, f"blocks.{block}"), config.heads[index])
    layers = {"features": features}
    if oracle.kept is not None:
        layers["scores"] = plain.importance(features, subset(weights, "importance"))
        merge = subset(weights, "merging")
        layers["merged_features"] = plain.merging(features, layers["scores"], oracle.kept, geometry, merge)
    return layers


def fast_stage(stage, features, oracle, geometry):
    """One stage of fast, under the reference's choice; batch of one."""
    for block in stage.blocks:
        features = block(features, geometry)
    layers = {"features": features}
    if oracle.kept is not None:
        layers["scores"] = stage.importance(features)
        kept = torch.from_numpy(oracle.kept)[None]
        layers["merged_features"] = stage.merging(features, layers["scores"], kept, geometry)
    return {name: value[0] for name, value in layers.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["nano", "layer_scale_global"])
def test_stages_agree_under_the_references_choice(name, dtype):
    model, config, weights = twins(SETTINGS[name], dtype)
    model = model.to(torch.promote_types(dtype, torch.float32))
    image, grid_size = prepare_image(pictures(64, 96)[0]), (16, 24)
    positions, features = grid_positions(grid_size), patch_embedding(image, subset(weights, "patch_embedding"))
    for index, (stage, keep) in enumerate(zip(model.stages, (96, 24, 6, None), strict=True)):
        low, part = torch.from_numpy(features).to(dtype), subset(weights, f"stages.{index}")
        oracle = reference.backbone.forward_stage(config, part, index, positions, low.double().numpy(), grid_size, keep)
        settings = config.cluster_size, config.neighborhood[index], grid_size, config.curve
        baseline = plain_stage(low, oracle, stage_geometry(positions, *settings), tensors(part, dtype), config, index)
        geometry = fast.neighborhoods.stage_geometry(torch.from_numpy(positions)[None], *settings, torch.float64)
        with torch.no_grad(), precision(dtype):
            got = fast_stage(stage, low[None], oracle, geometry)
        got = {layer: value.to(dtype) for layer, value in got.items()}  # the scores stay in float32 under autocast
        assert_layers(got, {k: getattr(oracle, k) for k in got}, baseline, dtype, name=f"stage {index + 1}")
        positions, features = oracle.merged_positions, oracle.merged_features


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_how_many_choices_flip_end_to_end(dtype):
    """The flips, by stage, are in the table at the end of the run as what is missing from "indices equal"."""
    model, config, weights = twins({})
    batch = pictures(128, 128)
    model = model.to(torch.promote_types(dtype, torch.float32))
    with torch.no_grad(), precision(dtype):
        _, stages = model.forward_features(torch.from_numpy(batch), return_stages=True)
    flips, chosen = 0, 0
    for image, picture in enumerate(batch):
        expected = reference.backbone.forward_features(config, weights, picture)
        for index in range(3):
            got, wanted = stages[index].merged_positions[image], torch.from_numpy(expected[index].merged_positions)
            cells = [p[:, 1] * 32 + p[:, 0] for p in (got, wanted)]
            name = f"choice of stage {index + 1}, end to end {str(dtype).removeprefix('torch.')}"
            flips, chosen = flips + count_equal(cells[0], cells[1].numpy(), name=name), chosen + len(wanted)
    assert flips <= ALLOWED_FLIPS[dtype] * chosen


def test_gradient_of_the_whole_agrees_with_central_differences_of_the_reference():
    """The choice stands still under so small a step; the importance learns through the merging alone."""
    model, config, weights = twins({"num_classes": 3})
    model, image = model.double(), pictures(32, 40, batch=1)
    grad_out = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    gradients = backward(model, {"image": torch.from_numpy(image)}, lambda i: model(i["image"]), grad_out)
    names = ("image", "patch_embedding.conv1.weight", "patch_embedding.batch_norm.bias", "head.weight")
    names += tuple(f"stages.0.{part}" for part in ("importance.weight", "blocks.0.attention.position.weight"))
    names += ("stages.1.merging.weight_net.0.weight", "stages.2.blocks.1.attention.blank_key", "norm.weight")

    def output(inputs):
        return reference.backbone.forward(config, inputs, inputs["image"][0])[0][None]

    chosen = {name: gradients[name] for name in names}
    assert_directional(chosen, output, {"image": image, **weights}, grad_out.numpy(), name="backbone gradient")


@pytest.mark.parametrize("height, width", [(33, 47), (62, 35)])
def test_padding_equals_zeros_after_normalisation(height, width):
    model, config, weights = twins({"rate": 0.4})
    image = pictures(height, width, batch=1)
    padded = np.pad(image, ((0, 0), (0, 0), (0, -height % 4), (0, -width % 4)))
    results = [reference.backbone.forward(config, weights, i[0])[0] for i in (image, padded)]
    assert (results[0] == results[1]).all()
    with torch.no_grad():
        results = [model.double()(torch.from_numpy(i)) for i in (image, padded)]
    assert torch.equal(*results)


@pytest.mark.parametrize("reserve", [True, False], ids=["reserved", "free"])
def test_choice_of_both_twins_is_right_by_its_definition(reserve):
    model, config, weights = twins({"reserve": reserve, "rate": 0.3})
    stages = reference.backbone.forward_features(config, weights, pictures(64, 64)[0])
    for number, stage in enumerate(stages[:3], start=1):
        assert len(stage.kept) == int(len(stage.positions) * 0.3)
        assert (stage.merged_positions == stage.positions[stage.kept]).all()
        raster = stage.merged_positions[:, 1] * 16 + stage.merged_positions[:, 0]
        assert (np.diff(raster) > 0).all()
        spacing = 2 ** (number + 1)
        on_coarse_grid = (stage.merged_positions % spacing == 0).all(axis=1).sum()
        assert on_coarse_grid == (16 // spacing) ** 2 or not reserve


def test_too_small_a_rate_gets_the_same_error_from_both():
    model, config, weights = twins({"rate": 0.2})
    image, messages = np.zeros((3, 36, 36)), []
    for run in (lambda: reference.backbone.forward(config, weights, image), lambda: model(torch.zeros(1, 3, 36, 36))):
        with pytest.raises(
            ValueError, match=r"rate 0\.2 is too small.*stage \d would keep K = \d+.*use rate >= "
        ) as error:
            run()
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def features_model():
    """A nano feature extractor with non-trivial weights."""
    model = fast.create_model("aff_nano", features_only=True).eval()
    fill(model)
    return model


def test_features_only():
    model, batch = features_model(), torch.from_numpy(pictures(64, 96, batch=2)).float()
    sets = model(batch)
    stages, grid_size = model.run_stages(batch)
    for tokens, stage, norm, info in zip(sets, stages, model.norms, model.feature_info, strict=True):
        assert torch.equal(tokens.positions, stage.positions) and tokens.grid_size == grid_size == (16, 24)
        assert torch.equal(tokens.features, norm(stage.features))
        assert tokens.features.shape[2] == info["num_chs"]
        model.get_submodule(info["module"])
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]
    assert model.num_classes == 0 and not hasattr(model, "head")


@pytest.mark.parametrize("h, w", [(16, 24), (8, 12), (5, 7), (1, 1), (33, 20)])
def test_to_grid_takes_the_nearest_token(h, w):
    """Brute force in integers; cell (i, j) of h x w has its centre at ((j + 1/2) W/w - 1/2, (i + 1/2) H/h - 1/2)."""
    for tokens in features_model()(torch.from_numpy(pictures(64, 96, batch=1)).float()):
        grid, positions = tokens.to_grid(h, w)[0], tokens.positions[0].numpy()
        assert grid.shape == (tokens.features.shape[2], h, w)
        for i, j in np.ndindex(h, w):
            x, y = (2 * j + 1) * 24 * h - w * h, (2 * i + 1) * 16 * w - h * w
            distance = (positions[:, 0] * 2 * h * w - x) ** 2 + (positions[:, 1] * 2 * h * w - y) ** 2
            assert torch.equal(grid[:, i, j], tokens.features[0, int(distance.argmin())])


def test_first_stage_on_its_own_grid_is_a_reshape():
    tokens = features_model()(torch.from_numpy(pictures(40, 64, batch=2)).float())[0]
    assert torch.equal(tokens.to_grid(10, 16), tokens.features.transpose(1, 2).unflatten(2, (10, 16)))
