"""Frozen parts stay bit for bit what they were; layers learn at the rates they are given; a run goes on as it was."""

import json

import pytest
import torch

import fast
from tests.seg_train_cases import KIND, config_of, fit, model_of, run_of
from tests.test_train_resume import assert_same
from train.common.distributed import Ranks
from train.common.errors import Interrupted, UserError
from train.config.loader import load_config
from train.engine import loop as engine
from train.engine.layers import freeze, layer_depths
from train.engine.loop import train
from train.engine.optimizer import build_optimizer, peak_rate
from train.engine.run import Run
from train.engine.scheduler import build_scheduler
from train.engine.state import set_training
from train.models.checkpoint import read_file
from train.tasks.classification import Classification
from train.tasks.segmentation import Segmentation

NANO = {"depths": [1, 1, 2, 1], "dims": [8, 16, 16, 24], "heads": [1, 1, 2, 2]}
EMA = ["--run.ema", "0.9", "--data.val_length", "4"]


def classifier():
    return fast.create_model("aff_nano", num_classes=3, **NANO)


def classify(folder, *options):
    return train(load_config("digits_smoke", ["--run.output", str(folder), *options]))


def weights_before(config, task=None):
    """Return a copy of the weights and statistics that a run starts from."""
    run = Run(config, Ranks("cpu"), task) if task else run_of(config)
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def unlike(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def optimised(run):
    known = {id(parameter): name for name, parameter in run.model.named_parameters()}
    return {known[id(parameter)] for group in run.optimizer.param_groups for parameter in group["params"]}


def test_a_frozen_backbone_of_a_classifier_stays(tmp_path):
    options = ["--optim.freeze", "backbone", "--optim.weight_decay", "0.5", *EMA]
    config = load_config("digits_smoke", ["--run.output", str(tmp_path), *options])
    before = weights_before(config, Classification(config))
    run = classify(tmp_path, *options)
    assert unlike(before, run.model.state_dict()) == {"head.weight", "head.bias"}
    assert unlike(before, run.ema.module.state_dict()) == {"head.weight", "head.bias"}
    assert optimised(run) == {"head.weight", "head.bias"}
    assert all(parameter.grad is None for name, parameter in run.model.named_parameters() if "head" not in name)


@pytest.mark.parametrize("patterns", [["backbone"], ["backbone.stages.0", "*.norm*", "backbone.patch_embedding"]])
def test_frozen_parts_of_a_segmenter_stay_and_the_others_learn(tmp_path, patterns):
    options = ["--optim.freeze", json.dumps(patterns), "--optim.weight_decay", 0.5, *EMA, "--run.output", tmp_path]
    before = weights_before(config_of(*options))
    run = fit(tmp_path, *options[:-2])
    frozen = {name for name, parameter in run.model.named_parameters() if not parameter.requires_grad}
    assert frozen and all(
        name.startswith(("backbone.", "pixel_decoder.", "decoder.")) and ("norm" in name or "backbone" in name)
        for name in frozen
    )
    trained = {name for name, _ in run.model.named_parameters()} - frozen
    assert optimised(run) == trained
    for state in (run.model.state_dict(), run.ema.module.state_dict()):
        moved = unlike(before, state)
        assert not moved - trained and "decoder.class_head.weight" in moved
    if patterns != ["backbone"]:
        assert "backbone.stages.1.blocks.0.mlp.fc1.weight" in moved


def test_frozen_modules_are_in_evaluation_mode():
    model = classifier()
    freeze(model, ["patch_embedding.batch_norm", "stages.2.*"])
    set_training(model, "local")
    assert not model.patch_embedding.batch_norm.training and model.patch_embedding.training
    assert not any(module.training for module in model.stages[2].modules())
    assert model.stages[1].blocks[0].drop_path.training and model.training
    freeze(model, ["stages.1.blocks.0.norm1.weight"])
    set_training(model, "local")
    assert model.stages[1].blocks[0].norm1.training


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("backbon", "nothing is called 'backbon' .did you mean 'backbone'.*: backbone, .*stages.3.*head"),
        ("stages.7.*", "nothing is called 'stages.7"),
        ("*", "leaves nothing to train"),
        ("", "nothing is called ''"),
    ],
)
def test_what_cannot_be_frozen_is_one_line(pattern, message):
    with pytest.raises(UserError, match=message) as caught:
        freeze(classifier(), [pattern])
    assert "\n" not in str(caught.value)


def test_patterns_are_read_from_the_command_line():
    assert load_config("digits_smoke", ["--optim.freeze", "*norm*"]).optim.freeze == ["*norm*"]
    assert load_config("digits_smoke", ["--optim.freeze=[stages.0, head]"]).optim.freeze == ["stages.0", "head"]
    with pytest.raises(UserError, match="optim.layer_decay"):
        load_config("digits_smoke", ["--optim.layer_decay", "1.5"])


def test_depths_count_blocks_from_the_head():
    expected = {
        "head.weight": 0, "norm.weight": 1, "stages.3.blocks.0.norm1.weight": 1, "stages.2.merging.linear.weight": 2,
        "stages.2.importance.weight": 2, "stages.2.blocks.1.mlp.fc1.weight": 2, "stages.2.blocks.0.mlp.fc1.weight": 3,
        "stages.1.blocks.0.attention.query.bias": 4, "stages.0.merging.linear.weight": 5,
        "stages.0.blocks.0.attention.blank_key": 5, "patch_embedding.conv1.weight": 6,
    }  # fmt: skip
    depths = layer_depths(classifier())
    assert {name: depths[name] for name in expected} == expected
    assert depths.keys() == dict(classifier().named_parameters()).keys()
    inner = layer_depths(model_of("--model.backbone.depths", "[1, 1, 2, 1]"))
    assert inner["decoder.class_head.weight"] == inner["pixel_decoder.level_embedding"] == 0
    shared = expected.keys() - {"head.weight", "norm.weight"}
    assert {name: inner[f"backbone.{name}"] for name in shared} == {name: expected[name] for name in shared}
    assert [inner[f"backbone.norms.{i}.weight"] for i in range(4)] == [5, 4, 2, 1]


def test_rates_of_a_classifier_fall_by_layer_at_every_update():
    model, depths = classifier(), layer_depths(classifier())
    config = load_config("imagenet_tiny", ["--optim.layer_decay", "0.5", "--optim.freeze", "stages.0"])
    freeze(model, config.optim.freeze)
    optimizer = build_optimizer(model, config)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    scheduler = build_scheduler(optimizer, config, 10)
    for update, rate in ((0, 5e-7), (200, 4e-3), (3000, 5e-6)):
        scheduler.step_update(update)
        for name, parameter in model.named_parameters():
            if name.startswith("stages.0"):
                assert id(parameter) not in groups
                continue
            assert groups[id(parameter)]["lr"] == pytest.approx(rate * 0.5 ** depths[name]), name
            assert (groups[id(parameter)]["weight_decay"] == 0.05) == (parameter.ndim > 1), name
    assert len(groups) == sum(not name.startswith("stages.0") for name, _ in model.named_parameters())


def test_rates_of_a_segmenter_fall_by_layer_within_the_backbone():
    config = config_of("--optim.layer_decay", 0.5, "--optim.backbone", 0.1, "--schedule.max_steps", 100)
    model = model_of()
    depths, optimizer = layer_depths(model), build_optimizer(model, config)
    scheduler = build_scheduler(optimizer, config, 10)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(groups) == len(depths)
    for update, left in ((0, 1.0), (50, 0.5**0.9)):
        scheduler.step_update(update)
        for name, parameter in model.named_parameters():
            part = 0.1 if name.startswith("backbone.") else 1.0
            assert groups[id(parameter)]["lr"] == pytest.approx(1e-3 * part * left * 0.5 ** depths[name]), name
    assert peak_rate(config)[1].endswith("backbone x 0.1, x 0.5 for each layer below the head")


def test_stopped_and_resumed_equals_never_stopped(tmp_path, monkeypatch, capsys):
    options = ["--optim.freeze", "[backbone.stages.0, backbone.patch_embedding]", "--optim.layer_decay", 0.8, *EMA]
    whole = fit(tmp_path / "whole", *options)
    assert "frozen: " in capsys.readouterr().out
    honest = engine.train_step

    def stop_at_3(run, pieces):
        run.stop.signal = 2 if run.done == 3 else run.stop.signal
        return honest(run, pieces)

    monkeypatch.setattr(engine, "train_step", stop_at_3)
    config = config_of("--run.output", tmp_path / "stopped", *options)
    with pytest.raises(Interrupted):
        train(config, task=Segmentation(config))
    last = tmp_path / "stopped" / "last.pt"
    for other, message in (
        (["--optim.layer_decay", 0.8], r"was trained with optim.freeze \['backbone.stages.0'.*not \[\] and 0.8"),
        (options[:2], "optim.layer_decay 0.8, not .* and None: go on so, or start from it by --model.init"),
    ):
        with pytest.raises(UserError, match=message):
            run_of(config_of("--run.output", tmp_path / "stopped", *other)).restore(last)
    train(config, last, Segmentation(config))
    states = [read_file(tmp_path / name / "last.pt", KIND) for name in ("whole", "stopped")]
    for state in states:
        del state["config"]
    assert_same(*states)
    assert whole.done == 8


def test_settings_of_the_optimiser_are_those_of_the_config_after_a_resume(tmp_path):
    fit(tmp_path, "--optim.layer_decay", 0.8, "--schedule.max_steps", 2, "--data.val_length", 1)
    changes = ["--optim.layer_decay", 0.5, "--optim.weight_decay", 0.3, "--optim.betas", "[0.8, 0.9]"]
    run = run_of(config_of("--run.output", tmp_path, *changes))
    run.restore(tmp_path / "last.pt")
    groups = run.optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    assert {tuple(group["betas"]) for group in groups} == {(0.8, 0.9)}
    assert min(group["lr_scale"] for group in groups) == 0.5**5
