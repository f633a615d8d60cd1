"""Odd values of the command line and of the model's shape: one line and exit code 2, before or at the first update."""

import re

import pytest
import torch

from tests.seg_train_cases import KIND, fit
from train import segment, show
from train.classify import main as classify
from train.common.errors import run_command
from train.models.checkpoint import read_file
from train.models.weights import weights_of


def refusal(main, arguments, capsys):
    """Run a command that must be refused: its one line."""
    capsys.readouterr()
    assert run_command(main, arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


ODD = [
    ("rate: 0.01", "model: rate 0.01 is too small for 8 x 8 cells.*use rate >= "),
    ("rate: x", "model: rate must be in"),
    ("alpha: x", "model: alpha must be a finite number"),
    ("alpha: .nan", "model: alpha must be a finite number"),
    ("mlp_ratio: -1", "model: mlp_ratio must be positive"),
    ("cluster_size: 8.0", "model: cluster_size must be a whole number"),
    ("cluster_size: 1000000000", "model: cluster_size must be at most 65536"),
    ("depths: [1, 1, 1]", "model: depths must hold 4"),
    ("dims: [1000000000, 16, 16, 24]", "model: dims must be at most 16,384"),
    ("heads: [3, 1, 2, 2]", "model: dims .* must be multiples of heads"),
    ("curve: 2024-11-25", "model: curve must be one of"),
]


@pytest.mark.parametrize(("override", "message"), ODD)
def test_odd_shapes_of_a_model(tmp_path, override, message, capsys):
    shape = {"depths": "[1, 1, 1, 1]", "dims": "[8, 16, 16, 24]", "heads": "[1, 1, 2, 2]"}
    key = override.partition(":")[0]
    small = "".join(f"{name}: {value}, " for name, value in shape.items() if name != key)
    arguments = ["--config", "digits_smoke", "--run.output", str(tmp_path), "--model.overrides"]
    assert re.search(message, refusal(classify, [*arguments, f"{{{small}{override}}}"], capsys))
    if key != "rate" or "x" in override:
        arguments = ["--config", "digits_panoptic_smoke", "--run.output", str(tmp_path), "--model.backbone"]
        assert re.search(message, refusal(segment.main, [*arguments, f"{{{override}}}"], capsys))
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize(
    "override", ["num_queries: 0", "num_queries: 1000000000", "hidden_dim: 6", "points: x", "heads: true", "lookup: a"]
)
def test_odd_shapes_of_a_head(tmp_path, override, capsys):
    arguments = ["--config", "digits_panoptic_smoke", "--run.output", str(tmp_path), "--model.overrides"]
    error = refusal(segment.main, [*arguments, f"{{{override}}}"], capsys)
    assert error.startswith(f"error: model: {override.partition(':')[0]}")


@pytest.mark.parametrize("text", ["2024-13-45", "9" * 5000, "[" * 5000, "{a: 1", "!!python/object:os.system x"])
def test_values_that_are_none(tmp_path, text, capsys):
    arguments = ["--config", "digits_smoke", "--run.output", str(tmp_path), "--optim.lr", text]
    assert "--optim.lr: cannot read" in refusal(classify, arguments, capsys)


def test_best_is_the_better_of_plain_and_averaged_weights(tmp_path, monkeypatch):
    from train.tasks.segmentation import Segmentation

    for plain, averaged in ((70.0, 20.0), (20.0, 70.0), (50.0, 50.0)):
        scores = iter([plain, averaged])
        monkeypatch.setattr(Segmentation, "evaluate", lambda *rest, s=scores: {"score": next(s), "PQ": 1.0})
        out = tmp_path / f"{plain}"
        fit(out, "--run.ema", 0.5, "--schedule.max_steps", 5, "--run.eval_every", 5, "--data.val_length", 1)
        best, last = (read_file(out / name, KIND) for name in ("best.pt", "last.pt"))
        assert best["best"] == last["best"] == max(plain, averaged)
        assert best["averaged"] is (averaged >= plain)
        expected = last["ema"] if averaged >= plain else last["model"]
        assert all(torch.equal(weight, expected[name]) for name, weight in weights_of(best).items())
        assert any(not torch.equal(last["ema"][name], last["model"][name]) for name in last["model"])


def test_show_says_that_it_takes_classifiers(tmp_path, capsys):
    fit(tmp_path, "--schedule.max_steps", 1, "--data.val_length", 1)
    out = ["--out", str(tmp_path / "t.png")]
    for weights in (["--checkpoint", str(tmp_path / "last.pt")], ["--pretrained", "nuclei"]):
        assert "holds a segmenter: train.predict draws its tokens, too" in refusal(show.main, [*weights, *out], capsys)
    assert not (tmp_path / "t.png").exists()
