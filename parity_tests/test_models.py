"""The API of the fast twin: names, options, image sizes and dtypes, training, refused input."""

import copy
import dataclasses

import pytest
import torch

import fast
from parity_tests.weights import fill
from reference.curves import CURVES

NAMES = ["aff_nano", "aff_mini", "aff_mini_1_5", "aff_tiny", "aff_tiny_1_5", "aff_small", "aff_small_1_5", "aff_base"]


def nano(seed=0, **options):
    """A nano model in evaluation with non-trivial weights."""
    model = fast.create_model("aff_nano", **{"num_classes": 5, **options}).eval()
    fill(model, seed)
    return model


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(got, wanted, tolerance=1e-5):
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_names():
    assert fast.list_models() == [*NAMES, "aff_base_384"]
    assert fast.model_config("aff_tiny_1_5").rate == 0.2
    base = fast.model_config("aff_base_384")
    assert base.cluster_size == 24 and base.neighborhood == (144,) * 4


def test_every_override_reaches_the_config():
    changed = {
        "num_classes": 3, "depths": (1, 2, 1, 1), "dims": (8, 12, 16, 20), "heads": (2, 3, 4, 5), "mlp_ratio": 3.0,
        "cluster_size": 5, "neighborhood": (10, 20, 15, 5), "rate": 0.5, "alpha": 8.0, "reserve": False,
        "layer_scale": 1e-3, "drop_path": 0.1, "curve": "peano", "stride_metric": "l1",
    }  # fmt: skip
    assert set(changed) == {field.name for field in dataclasses.fields(fast.Config)}
    model = fast.create_model("aff_nano", **changed)
    assert dataclasses.asdict(model.config) == changed
    assert model(images(1, 3, 32, 32)).shape == (1, 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.config.rate = 1.0


BAD_OPTIONS = {
    "unknown name": (("aff_minni",), {}, "unknown model 'aff_minni'; did you mean 'aff_mini'"),
    "far name": (("zzzz",), {}, "unknown model 'zzzz'; known: aff_nano, "),
    "unknown override": (
        ("aff_nano",),
        {"clustersize": 4},
        "unknown override 'clustersize'; did you mean 'cluster_size'",
    ),
    "depths": (("aff_nano",), {"depths": (1, 1, 1)}, "depths must hold 4 positive whole numbers"),
    "heads": (("aff_nano",), {"heads": (3, 3, 3, 3)}, "must be multiples of heads"),
    "rate": (("aff_nano",), {"rate": 0}, "rate must be in"),
    "cluster_size": (("aff_nano",), {"cluster_size": 0}, "cluster_size"),
    "curve": (("aff_nano",), {"curve": "hilbret"}, "curve"),
    "stride_metric": (("aff_nano",), {"stride_metric": "l3"}, "stride_metric"),
    "drop_path": (("aff_nano",), {"drop_path": 1.5}, "drop_path"),
    "num_classes": (("aff_nano",), {"num_classes": -1}, "num_classes"),
    "depths text": (("aff_nano",), {"depths": "abcd"}, "depths"),
    "depths number": (("aff_nano",), {"depths": 2}, "depths"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options_are_refused_by_name_when_the_model_is_made(name):
    arguments, options, message = BAD_OPTIONS[name]
    with pytest.raises(ValueError, match=message) as error:
        fast.create_model(*arguments, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "image, kind, message",
    [
        (torch.zeros(1, 3, 31, 64), ValueError, "at least 32 x 32 pixels, but is 31 x 64"),
        (torch.zeros(1, 4, 32, 32), ValueError, "3 channels"),
        (torch.zeros(3, 32, 32), ValueError, "3 channels"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int64), TypeError, "not torch.int64"),
        (torch.full((1, 3, 32, 32), torch.inf), ValueError, "NaN or infinite"),
        (torch.full((1, 3, 32, 32), torch.nan), ValueError, "NaN or infinite"),
    ],
    ids=["small", "four_channels", "no_batch", "int64", "infinite", "nan"],
)
def test_bad_images_are_refused(image, kind, message):
    with pytest.raises(kind, match=message):
        nano()(image)


def test_the_rate_that_the_message_suggests_works():
    with pytest.raises(ValueError, match="use rate >= ") as error:
        nano(rate=0.1)(images(1, 3, 40, 72))
    rate = float(str(error.value).rsplit(" ", 1)[1])
    assert nano(rate=rate)(images(1, 3, 40, 72)).isfinite().all()


@pytest.mark.parametrize("height, width", [(32, 32), (33, 47), (65, 130), (32, 200), (127, 36), (101, 101)])
def test_any_size_from_32_up(height, width):
    model = nano(rate=0.3)
    _, stages = model.forward_features(images(2, 3, height, width), return_stages=True)
    n = -(-height // 4) * -(-width // 4)
    for stage, dim in zip(stages, (16, 32, 48, 64), strict=True):
        assert stage.features.shape == (2, n, dim) and stage.positions.shape == (2, n, 2)
        assert stage.order.shape == stage.cluster.shape == (2, n)
        n = int(n * 0.3)
    assert model(images(2, 3, height, width)).isfinite().all()


def test_batches_and_sizes_in_any_order_do_not_disturb_each_other():
    models = [nano(), fast.create_model("aff_nano", num_classes=5, cluster_size=6, rate=0.5).eval()]
    fill(models[1], seed=1)
    shapes = [(1, 3, 64, 64), (3, 3, 64, 64), (2, 3, 48, 80), (1, 3, 64, 64), (5, 3, 32, 64), (2, 3, 64, 64)]
    fresh = [[copy.deepcopy(model)(images(*shape)) for shape in shapes] for model in models]
    for _ in range(2):
        for model, wanted in zip(models, fresh, strict=True):
            assert all(torch.equal(model(images(*shape)), w) for shape, w in zip(shapes, wanted, strict=True))


def test_result_of_an_image_does_not_depend_on_its_batch():
    model, batch = nano().double(), images(4, 3, 48, 64).double()
    close(model(batch), torch.cat([model(image[None]) for image in batch]), 1e-10)
    close(model(batch[[3, 1]]), model(batch)[[3, 1]], 1e-10)


def test_an_empty_batch_gives_no_logits():
    assert nano()(torch.empty(0, 3, 64, 64)).shape == (0, 5)


def test_uint8_equals_the_normalised_float():
    model, generator = nano(), torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (2, 3, 40, 64), dtype=torch.uint8, generator=generator)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    close(model(raw), model((raw / 255 - mean) / std))


def test_memory_layout_does_not_matter():
    model, batch = nano().double(), images(2, 3, 64, 96).double()
    wanted = model(batch[:, :, ::2, ::2].contiguous())
    close(model(batch[:, :, ::2, ::2]), wanted, 1e-10)
    close(model(batch[:, :, ::2, ::2].contiguous(memory_format=torch.channels_last)), wanted, 1e-10)


OPTIONS = {
    "keep_all": {"rate": 1.0},
    "half": {"rate": 0.5},
    "fifth": {"rate": 0.2},
    "odd_rate": {"rate": 0.31},
    "l1": {"stride_metric": "l1"},
    "free": {"reserve": False, "rate": 0.22},
    "global_first": {"neighborhood": (10**6, 48, 48, 49)},
    "global_everywhere": {"neighborhood": (10**6,) * 4},
    "clusters_of_one": {"cluster_size": 1, "neighborhood": (9, 9, 9, 9)},
    "layer_scale": {"layer_scale": 1e-5},
    **{curve: {"curve": curve} for curve in CURVES},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_trains(name):
    model = nano(**OPTIONS[name]).train()
    found = gradients(model, images(2, 3, 64, 64))
    assert all(g.isfinite().all() and g.any() for g in found.values()), [k for k, g in found.items() if not g.any()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"rate": 1.0, "layer_scale": 1.0}], ids=["quarter", "keep_all"])
def test_autocast(dtype, options):
    model, batch = nano(**options), images(2, 3, 64, 64)
    wanted, (_, stages) = model(batch), model.forward_features(batch, return_stages=True)
    with torch.autocast("cpu", dtype):
        got, (_, low) = model(batch), model.forward_features(batch, return_stages=True)
    assert got.dtype == dtype and got.isfinite().all()
    close(got.float(), wanted, 0.1)
    assert torch.equal(low[0].order, stages[0].order) and low[1].positions.dtype == torch.int64
    assert low[0].scores.dtype == torch.float32
    with torch.autocast("cpu", dtype):
        loss = model.train()(batch).float().square().sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_model_of_another_dtype(dtype):
    model, batch = nano(), images(2, 3, 64, 64)
    wanted = model(batch)
    got = model.to(dtype)(batch)
    assert got.dtype == dtype
    close(got.float(), wanted, 0.15)


def test_drop_path_acts_in_training_only_and_rises_with_depth():
    model, batch = nano(drop_path=0.5), images(2, 3, 32, 32)
    assert torch.equal(model(batch), nano()(batch))
    probabilities = [block.drop_path.probability for stage in model.stages for block in stage.blocks]
    assert probabilities == pytest.approx([0, 0.125, 0.25, 0.375, 0.5])
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(model(batch), model(batch))


def test_layer_scale_multiplies_the_updates():
    model, plain = fast.create_model("aff_nano", layer_scale=0.0), fast.create_model("aff_nano")
    assert {n for n, _ in model.named_parameters()} - {n for n, _ in plain.named_parameters()} == {
        f"stages.{i}.blocks.{j}.scale{k}" for i, j in ((0, 0), (1, 0), (2, 0), (2, 1), (3, 0)) for k in (1, 2)
    }
    x, model = images(1, 3, 32, 32), model.eval()
    _, stages = model.forward_features(x, return_stages=True)
    assert torch.equal(stages[0].features, model.patch_embedding(x))


def test_training_moves_the_running_statistics_and_evaluation_does_not():
    model, batch = nano(), images(2, 3, 32, 32)
    before = model.patch_embedding.batch_norm.running_mean.clone()
    model(batch)
    assert torch.equal(model.patch_embedding.batch_norm.running_mean, before)
    model.train()(batch)
    assert not torch.equal(model.patch_embedding.batch_norm.running_mean, before)


def test_gradient_checkpointing_changes_no_gradient():
    model, batch = nano().train(), images(2, 3, 48, 48)
    wanted = gradients(model, batch)
    model.set_grad_checkpointing()
    assert model.grad_checkpointing
    got = gradients(model, batch)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    model.set_grad_checkpointing(False)
    assert not model.grad_checkpointing


def test_importance_learns_through_the_merging():
    found = gradients(nano().train(), images(1, 3, 48, 48))
    assert all(found[f"stages.{i}.importance.weight"].abs().max() > 0 for i in range(3))


def test_classifier():
    model, batch = nano(), images(2, 3, 32, 32)
    features = model.forward_features(batch)
    assert torch.equal(model.forward_head(features), model(batch))
    assert torch.equal(model.forward_head(features, pre_logits=True), features.mean(dim=1))
    assert isinstance(model.get_classifier(), torch.nn.Linear) and model.get_classifier().out_features == 5
    model.double().reset_classifier(11)
    assert model.num_classes == 11 and model(batch.double()).shape == (2, 11)
    model.reset_classifier(0)
    assert torch.equal(model(batch.double()), model.forward_features(batch.double()).mean(dim=1))
    assert fast.create_model("aff_nano", num_classes=0)(batch).shape == (2, 64)


def test_names_spared_by_weight_decay_are_parameters():
    model = nano()
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}
    many = {name for name, p in model.named_parameters() if p.ndim >= 2}
    assert "stages.0.blocks.0.attention.blank_key" not in many and "head.bias" not in many


def test_copies_and_state_dicts():
    model, batch = nano(), images(1, 3, 32, 32)
    twin, other = copy.deepcopy(model), fast.create_model("aff_nano", num_classes=5).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(twin(batch), model(batch)) and torch.equal(other(batch), model(batch))
    assert not any("grid" in name for name in model.state_dict())


def test_inference_mode_leaves_nothing_behind_that_training_could_not_use():
    model, batch = nano(), images(1, 3, 32, 32)
    with torch.inference_mode():
        wanted = model(batch)
    assert torch.equal(model(batch), wanted)
    gradients(model, batch)


def test_fresh_weights_come_from_the_seed():
    torch.manual_seed(3)
    first = fast.create_model("aff_nano").state_dict()
    torch.manual_seed(3)
    second = fast.create_model("aff_nano").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(value.isfinite().all() for value in first.values())
