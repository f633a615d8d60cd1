"""Configs, learning rates and optimiser groups of training."""

import os

import pytest
import torch
from torch import nn

from train.common.distributed import Ranks
from train.common.errors import UserError
from train.config.loader import config_names, load_config
from train.config.segmentation import Config as SegmentConfig
from train.engine.optimizer import build_optimizer, peak_rate
from train.engine.scheduler import build_scheduler


def test_every_config_loads_and_says_what_it_needs():
    from train.config.section import CONFIGS

    for name in config_names():
        load_config(name)
        head = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").split("model:")[0]
        assert "python -m train." in head or "-m train.classify" in head, name
        assert "Hardware" in head, name


def test_there_is_a_config_for_each_published_variant():
    models = {load_config(name).model.name for name in config_names()}
    import fast

    assert models == set(fast.list_models())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optim.lrr", "1"], "unknown key 'optim.lrr' (did you mean 'optim.lr'?)"),
        (["--optm.lr", "1"], "unknown key 'optm' (did you mean"),
        (["--optim.lr", "fast"], "optim.lr: .*valid number"),
        (["--optim", "3"], "optim is a group of options, not 3: set one of them, as optim.lr"),
        (["--optim.lr"], "--optim.lr needs a value"),
        (["optim.lr", "1"], "unexpected argument 'optim.lr'"),
        (["--augment.mixup", "0.8", "--run.batch_size", "7"], "batch_size must be even"),
    ],
)
def test_bad_override_is_named_in_one_line(arguments, message):
    with pytest.raises(UserError) as caught:
        load_config("digits_smoke", arguments)
    assert "\n" not in str(caught.value)
    assert caught.match(message.replace("(", r"\(").replace("?)", r"\?\)"))


def test_unknown_config_names_the_closest():
    with pytest.raises(UserError, match="did you mean 'imagenet_mini'"):
        load_config("imagenet_minni")


def test_overrides_reach_every_kind_of_value():
    config = load_config("digits_smoke", ["--optim.lr=1e-3", "--model.overrides.rate", "0.2", "--data", "/a,/b"])
    assert config.optim.lr == 1e-3
    assert config.model.overrides["rate"] == 0.2
    assert (config.data.source, config.data.path) == ("images", ["/a", "/b"])


@pytest.mark.parametrize("text", ["exp #3", "2024-11-25", "007", "no", "@lab", "12:30", "1e-3", "null", "[a]", "a: b"])
def test_text_is_taken_as_text(text):
    assert load_config("digits_smoke", ["--run.output", text]).run.output == text
    segmenter = load_config("digits_panoptic_smoke", [f"--run.output={text}", "--data.images", "a #1"], SegmentConfig)
    assert segmenter.run.output == text and segmenter.data.images == ["a #1"]


def test_texts_that_may_be_missing_lists_of_them_and_the_home_folder():
    arguments = ["--model.init", "null", "--data.train", "[/a b, /c]", "--run.output=~/runs", "--run.amp", "off"]
    config = load_config("digits_smoke", arguments)
    assert config.model.init is None and config.data.train == ["/a b", "/c"] and config.run.amp == "off"
    assert config.run.output == os.path.expanduser("~/runs")
    assert load_config("digits_smoke", ["--model.init", "no", "--data=~/x"]).data.path == [os.path.expanduser("~/x")]
    with pytest.raises(UserError, match="augment.flip"):
        load_config("digits_smoke", ["--augment.flip", "a #3"])


def test_peak_rate_follows_the_batch_and_shows_it():
    config = load_config("imagenet_tiny")
    rate, words = peak_rate(config)
    assert rate == pytest.approx(4e-3)
    assert words == "learning rate 0.0005 x 4096 / 512 = 0.004"


def test_schedule_has_the_published_numbers():
    config = load_config("imagenet_tiny")
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2, 2))], lr=peak_rate(config)[0])
    scheduler = build_scheduler(optimizer, config, 10)
    rates = []
    for update in range(3001):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(5e-7)
    assert rates[200] == max(rates) == pytest.approx(4e-3)
    assert rates[100] == pytest.approx((5e-7 + 4e-3) / 2)
    assert rates[1600] == pytest.approx((4e-3 + 5e-6) / 2)
    assert rates[3000] == pytest.approx(5e-6)


def test_weight_decay_spares_one_dimensional_parameters():
    import fast

    model = fast.create_model("aff_nano", num_classes=10, layer_scale=1e-5)
    groups = build_optimizer(model, load_config("imagenet_tiny")).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (parameter.ndim > 1), name
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}


def test_cuda_without_gpu_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="pass --run.device cpu"):
        Ranks("cuda")


def test_first_weights_have_the_gain_that_is_asked_for():
    """Linear layers of the backbone have std gain / sqrt(inputs); the importance's own 0.02 and all biases stay."""
    from train.config.classification import Config
    from train.config.segmentation import Config as SegmentConfig
    from train.models.classifier import build_model as classifier
    from train.models.segmenter import build_model as segmenter

    plain, asked = (classifier(Config(model={"name": "aff_mini", "init_gain": gain})) for gain in (None, 1.4))
    sections = {"model": {"name": "aff_mini", "num_classes": 2, "init_gain": 1.4}}
    for model in (asked, segmenter(SegmentConfig(**sections)).backbone):
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and module.weight.numel() > 5000:
                spread = module.weight.std().item() * module.in_features**0.5
                assert spread == pytest.approx(1.4 * 0.8796, rel=0.05), name  # normal numbers cut at two deviations
                assert module.bias is None or not module.bias.any() or name == "head"
    assert plain.stages[1].blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert asked.stages[1].importance.weight.abs().max().item() < 0.1
