"""Weights that a segmenter starts from, and mistakes on the command line: each listed or named in one line."""

import json
import re

import pytest
import torch

import fast
from tests.seg_train_cases import KIND, config_of, model_of
from train import segment
from train.classify import main as classify
from train.common.errors import UserError, run_command
from train.config.loader import load_config
from train.models.checkpoint import read_file, write_file
from train.models.classifier import build_model as build_classifier


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights in files: ours of 16 and of 7 classes, official, HCFormer's, and a classifier's."""
    folder = tmp_path_factory.mktemp("weights")
    models = {
        "ours": model_of(),
        "seven": model_of("--model.num_classes", 7),
        "hcformer": model_of("--model.head", "hcformer"),
    }
    for name, model in models.items():
        write_file(folder / f"{name}.pt", {"kind": KIND, "model": model.state_dict(), "ema": None, "config": {}})
    torch.save({"model": fast.checkpoints.to_official(models["ours"].state_dict())}, folder / "official.pth")
    backbone = config_of().model.backbone
    classifier = fast.create_model("aff_nano", num_classes=5, alpha=8.0, **backbone)
    torch.save({"model": fast.checkpoints.to_official(classifier.state_dict())}, folder / "classifier.pth")
    return folder


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("seven.pt", [], r"decoder.class_head.weight \(8, 16\) for \(17, 16\).*they know 7 classes.*--model.new_class"),
        ("hcformer.pt", [], "not in the file: .*pixel_decoder.*not in the model: assignments.*of a hcformer head"),
        ("ours.pt", ["--model.overrides.num_queries", 9], r"decoder.query_features.weight \(8, 16\) for \(9, 16\)"),
        ("classifier.pth", [], "holds a classifier, not a segmenter: pass it as --model.backbone_init"),
        ("nowhere.pt", [], "no checkpoint .*nowhere.pt"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_listed(files, name, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        model_of("--model.init", files / name, *arguments)
    assert "\n" not in str(caught.value)


def test_weights_to_start_from_arrive(files):
    ours = read_file(files / "ours.pt", KIND)["model"]
    for name in ("ours.pt", "official.pth"):
        found = model_of("--model.init", files / name).state_dict()
        assert all(torch.equal(found[key], weight) for key, weight in ours.items()), name
    fresh = model_of("--model.init", files / "seven.pt", "--model.new_classifier", "true")
    seven = read_file(files / "seven.pt", KIND)["model"]
    assert fresh.decoder.class_head.weight.shape == (17, 16)
    assert torch.equal(fresh.decoder.query_features.weight, seven["decoder.query_features.weight"])


def test_backbones_start_from_classifiers_ours_and_official(files, tmp_path):
    official = fast.checkpoints.from_official(fast.checkpoints.load(files / "classifier.pth"))
    overrides = "{depths: [1, 1, 1, 1], dims: [8, 16, 16, 24], heads: [1, 1, 2, 2]}"
    arguments = ["--model.overrides", overrides, "--model.init", str(files / "classifier.pth")]
    options = ["--config", "digits_smoke", "--run.output", str(tmp_path), "--schedule.epochs", "1"]
    classify([*options, *arguments, "--data.train_length", "16", "--data.val_length", "4"])
    own = read_file(tmp_path / "last.pt")["model"]
    for path, weights in ((files / "classifier.pth", official), (tmp_path / "last.pt", own)):
        backbone = model_of("--model.backbone_init", path, "--model.backbone.alpha", 8).backbone.state_dict()
        for name, weight in backbone.items():
            assert name.startswith("norms.") or torch.equal(weight, weights[name]), name
    assert build_classifier(load_config("digits_smoke", arguments))  # and classifiers start from official ones


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "digits_panoptic_smok"], "did you mean 'digits_panoptic_smoke'"),
        (["--config", "ade20k_mini"], "no pictures named: pass --data PATH"),
        (["--config", "ade20k_mini", "--data", "nowhere"], "nowhere"),
        (["--config", "coco_instance_mini", "--data", "one.json"], "one.json is one split: pass --data TRAIN.json,VAL"),
        (["--config", "digits_panoptic_smoke", "--model.num_classes", "5"], "data have 16 classes .*num_classes is 5"),
        (["--config", "digits_panoptic_smoke", "--schedule.kind", "steps"], "needs schedule.steps"),
        (["--config", "digits_panoptic_smoke", "--model.overrides.num_querys", "5"], "did you mean 'num_queries'"),
        (["--config", "digits_panoptic_smoke", "--evaluate"], "name the weights to evaluate"),
        (["--config", "digits_panoptic_smoke", "--results", "x"], "--results needs --evaluate"),
        (["--config", "digits_panoptic_smoke", "--official", "nowhere.pkl"], "no checkpoint nowhere.pkl"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(capsys, tmp_path, arguments, message):
    assert run_command(segment.main, [*arguments, "--run.output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error), error


def test_a_checkpoint_of_the_other_command_is_named(tmp_path):
    write_file(tmp_path / "last.pt", {"kind": KIND})
    with pytest.raises(UserError, match="no checkpoint of train.classify, but of train.segment"):
        read_file(tmp_path / "last.pt")


def test_official_weights_are_evaluated_and_results_written(files, tmp_path, capsys):
    arguments = ["--config", "digits_panoptic_smoke", "--official", str(files / "official.pth"), "--evaluate"]
    assert segment.main([*arguments, "--results", str(tmp_path), "--data.val_length", "2"]) == 0
    assert "PQ" in capsys.readouterr().out
    assert (tmp_path / "panoptic_val_results.json").is_file()
    assert len(json.loads((tmp_path / "detections_val_results.json").read_text())) > 0
