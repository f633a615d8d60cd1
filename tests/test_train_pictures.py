"""Pictures, the focus ratio, evaluation of checkpoints and the demonstration."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from train import demo_classify, evaluate, show
from train.classify import main as classify
from train.common.errors import UserError, run_command
from train.config.loader import load_config
from train.metrics.focus_ratio import Focus, is_inside
from train.models.classifier import build_model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    threads, folder = torch.get_num_threads(), tmp_path_factory.mktemp("run")
    classify(["--config", "digits_smoke", "--run.output", str(folder)])
    torch.set_num_threads(threads)
    return folder


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_show_draws_any_picture(tmp_path, trained, mode):
    picture = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(picture)
    out = tmp_path / "deep" / "tokens.png"
    assert show.main([str(picture), "--checkpoint", str(trained / "best.pt"), "--out", str(out)]) == 0
    with Image.open(out) as drawing:
        drawn = np.asarray(drawing)
    assert min(drawn.shape[:2]) > 300 and len(np.unique(drawn.reshape(-1, drawn.shape[2]), axis=0)) > 50


def test_slender_pictures_are_shown_smaller_and_too_large_ones_refused(tmp_path):
    for size, shown in (
        ((1, 5000), (32, 1024)),
        ((5000, 1), (1024, 32)),
        ((40, 80), (64, 128)),
        ((10, 200), (51, 1024)),
    ):
        Image.new("L", size).save(tmp_path / "a.png")
        assert show.open_picture(str(tmp_path / "a.png"), 64).shape == (*shown[::-1], 3)
    with pytest.raises(UserError, match="would see 10,240 x 5,120 pixels: pass a smaller --size"):
        Image.new("L", (4, 2)).save(tmp_path / "a.png")
        show.open_picture(str(tmp_path / "a.png"), 5120)


def test_show_finds_the_tokens_the_network_used(trained):
    model, config = evaluate.open_trained(str(trained / "best.pt"), None, None)
    stages = show.find_tokens(model, show.open_picture(None, config.data.size))
    assert [len(stage["positions"]) for stage in stages] == [64, 16, 4, 1]
    assert stages[0]["strides"].tolist() == [1] * 64
    assert stages[0]["cluster"].max() == 7


def test_evaluate_agrees_with_training(trained, capsys):
    assert evaluate.main(["--checkpoint", str(trained / "last.pt")]) == 0
    last = json.loads((trained / "log.jsonl").read_text().splitlines()[-1])
    expected = (
        f"top-1 {100 * last['top1']:.2f} %, top-5 {100 * last['top5']:.2f} %, loss {last['loss']:.4f} on 40 images"
    )
    assert expected in capsys.readouterr().out


def test_evaluate_takes_official_weights(tmp_path, capsys):
    import fast

    model = build_model(load_config("digits_smoke"))
    torch.save({"model": fast.checkpoints.to_official(model.state_dict())}, tmp_path / "official.pth")
    assert evaluate.main(["--config", "digits_smoke", "--official", str(tmp_path / "official.pth")]) == 0
    assert "top-1" in capsys.readouterr().out


def test_other_classes_get_a_new_head(trained):
    options = ["--model.num_classes", "4", "--model.init", str(trained / "best.pt")]
    model = build_model(load_config("digits_smoke", options))
    weights = torch.load(trained / "best.pt", weights_only=True)["model"]
    assert model.head.weight.shape[0] == 4
    assert torch.equal(model.norm.weight, weights["norm.weight"])


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (show.main, ["nowhere.png"], "cannot read picture nowhere.png"),
        (show.main, ["--model", "aff_minni"], "did you mean 'aff_mini'"),
        (evaluate.main, [], "--checkpoint FILE, or --config NAME with --official FILE"),
        (evaluate.main, ["--checkpoint", "nowhere.pt"], "no checkpoint nowhere.pt"),
        (evaluate.main, ["--config", "digits_smoke", "--official", "nowhere.pt"], "no checkpoint nowhere.pt"),
        (classify, [], "required: --config"),
        (demo_classify.main, ["--config", "imagenet_mini"], "demonstration is on Scattered Digits"),
        (classify, ["--config", "digits_smoke", "--model.overrides.rat", "0.2"], "did you mean 'rate'"),
        (classify, ["--config", "digits_smoke", "--data.digits.backgroud", "1"], "data.digits: .*backgroud"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(capsys, command, arguments, message):
    assert run_command(command, arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error), error


def test_focus_ratio_of_all_cells_is_one_and_of_the_box_alone_infinite():
    cells = torch.cartesian_prod(torch.arange(12), torch.arange(8))
    box = (7, 3, 23, 19)
    every, inner = Focus(), Focus()
    every.add(cells, box, (8, 12))
    assert every.ratio == 1
    assert every.cells == [16, 80]
    inner.add(cells[is_inside(cells, box)][:4], box, (8, 12))
    assert inner.tokens == [4, 0] and np.isnan(inner.ratio)
    inner.add(torch.tensor([[0, 0]]), box, (8, 12))
    assert inner.ratio == pytest.approx((4 / 32) / (1 / 160))


def test_demo_draws_reports_and_fails_below_80_percent(tmp_path, capsys):
    threads = torch.get_num_threads()
    code = demo_classify.main(["--config", "digits_smoke", "--run.output", str(tmp_path), "--schedule.epochs", "1"])
    torch.set_num_threads(threads)
    report = json.loads((tmp_path / "demo.json").read_text())
    text = capsys.readouterr().out
    assert code == 1 and report["accuracy"] < 0.8
    assert "(chance 10 %" in text and "focus ratio" in text and "background 0.2" in text
    assert len(report["focus_ratio"]) == 3
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size[0] > 500
