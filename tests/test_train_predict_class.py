"""A picture's class by name, from a trained classifier; and each class's scores printed."""

import json

import pytest
import torch
from PIL import Image

from train import predict
from train.classify import main as classify
from train.common.errors import run_command
from train.models.checkpoint import KIND, write_file
from train.segment import print_scores

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train a classifier of plain colours, which is easy."""
    threads, root = torch.get_num_threads(), tmp_path_factory.mktemp("colours")
    for split in ("train", "val"):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for number in range(8):
                Image.new("RGB", (40, 40), colour).save(root / split / name / f"{number}.png")
    batch = ["--run.batch_size", "6", "--run.total_batch", "6", "--model.num_classes", "3", "--data.workers", "0"]
    schedule = ["--schedule.epochs", "12", "--optim.lr", "5e-3", "--run.output", str(root / "run")]
    assert run_command(classify, ["--config", "digits_smoke", "--data", str(root), *batch, *schedule]) == 0
    torch.set_num_threads(threads)
    state = torch.load(root / "run" / "best.pt", weights_only=True)
    assert state["kind"] == KIND
    write_file(root / "named.pt", state | {"classes": sorted(COLOURS)})
    write_file(root / "unnamed.pt", state | {"classes": None})
    write_file(root / "damaged.pt", state | {"classes": ["a"]})
    return root


@pytest.fixture
def pictures(tmp_path):
    for name, colour in COLOURS.items():
        Image.new("RGB", (50, 40), colour).save(tmp_path / f"{name}.png")
    return tmp_path


def test_a_classifier_names_what_pictures_show(trained, pictures, tmp_path, capsys):
    (pictures / "bad.png").write_bytes(b"no picture")
    arguments = [str(pictures), "--checkpoint", str(trained / "named.pt"), "--out", str(tmp_path / "out")]
    assert run_command(predict.main, arguments) == 1
    out, error = capsys.readouterr()
    assert "3 pictures, 1 unreadable" in out and "skipped cannot read picture" in error and "bad.png" in error
    for label, name in enumerate(COLOURS):
        found = json.loads((tmp_path / "out" / f"{name}.json").read_text())["classes"]
        assert found[0]["name"] == name and found[0]["label"] == label and len(found) == 3
        assert sum(each["score"] for each in found) == pytest.approx(1, abs=1e-3)
        assert f"{pictures / name}.png: {name} {100 * found[0]['score']:.1f} %" in out


def test_classes_without_names_are_numbered_and_labels_kept(trained, pictures, tmp_path, capsys):
    arguments = [str(pictures / "red.png"), "--out", str(tmp_path), "--checkpoint"]
    assert run_command(predict.main, [*arguments, str(trained / "damaged.pt")]) == 2
    assert "1 names for 3 classes" in capsys.readouterr().err
    (pictures / "red.json").write_text("labels")
    assert run_command(predict.main, [*arguments, str(trained / "unnamed.pt")]) == 2
    assert "red.json exists and was not written by this command" in capsys.readouterr().err
    (pictures / "red.json").unlink()
    assert run_command(predict.main, [*arguments, str(trained / "unnamed.pt")]) == 0
    assert json.loads((pictures / "red.json").read_text())["classes"][0]["name"] == "class 2"


def test_each_class_is_printed(capsys):
    per_class = {"bolt": {"AP": 12.5, "AP50": 25.0}, "a long name": {"AP": None, "IoU": 3.0}}
    print_scores({"score": 1.0, "AP": 12.5, "images": 3, "per_class": per_class})
    assert capsys.readouterr().out.splitlines() == [
        "AP               12.50",
        "images           3",
        "class             AP     AP50      IoU",
        "bolt           12.50    25.00        -",
        "a long name        -        -     3.00",
    ]
    print_scores({"AP": 12.5, "per_class": {}})
    assert capsys.readouterr().out == "AP               12.50\n"
