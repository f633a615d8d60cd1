"""Weights and data that number their classes otherwise: matched by name, or refused; never by number alone."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.seg_train_cases import KIND, config_of
from tests.seg_trees import bands, picture, write_png
from train import evaluate, segment
from train.classify import main as classify
from train.common.errors import run_command
from train.models.checkpoint import KIND as CLASSIFIER
from train.models.checkpoint import read_file, write_file
from train.models.segmenter import build_model

NAMES = ["ground", "square", "disc"]
COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


def masks(root, names):
    """Write four pictures each for training and validation, whose classes are numbered in the order of the names."""
    numbers = [names.index(name) if name in names else i for i, name in enumerate(NAMES)]
    for split in ("train", "val"):
        for number in range(4):
            write_png(root / split / "images" / f"{number}.png", picture(number))
            write_png(root / split / "masks" / f"{number}.png", bands(*numbers))
    (root / "classes.json").write_text(json.dumps({"names": {str(i): name for i, name in enumerate(names)}}))
    return root


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    """Train a segmenter of three classes a little."""
    root = tmp_path_factory.mktemp("segmenter")
    assert segment.main(options(masks(root / "data", NAMES), root / "run")) == 0
    return root


def options(data, out):
    """Words of a command line that trains on masks."""
    fixed = [
        "--data.task",
        "semantic",
        "--evaluator.tasks",
        "[semantic]",
        "--run.batch_size",
        "2",
        "--run.total_batch",
        "2",
    ]
    schedule = ["--schedule.max_steps", "2", "--run.eval_every", "2", "--model.num_classes", "null"]
    paths = ["--data", str(data), "--run.output", str(out)]
    return ["--config", "digits_panoptic_smoke", *paths, *fixed, *schedule]


def scores(capsys, *words):
    """Evaluate: exit code, IoU of each class by name, and the error."""
    capsys.readouterr()
    code = run_command(segment.main, list(words))
    out, error = capsys.readouterr()
    rows = out.partition("class ")[2].splitlines()[1:]
    return code, {row.split()[0]: row.split()[1] for row in rows}, error


def test_a_segmenter_s_classes_are_found_by_name(tmp_path, segmenter, capsys):
    best, evaluated = str(segmenter / "run" / "best.pt"), []
    for number, names in enumerate((NAMES, NAMES[::-1], [NAMES[1], NAMES[2], NAMES[0]])):
        data = masks(tmp_path / str(number), names)
        code, found, _ = scores(capsys, *options(data, tmp_path), "--evaluate", "--model.init", best)
        assert code == 0 and found.keys() == set(NAMES)
        evaluated.append(found)
    assert evaluated[0] == evaluated[1] == evaluated[2]
    assert len(set(evaluated[0].values())) > 1  # a wrong order would be seen
    weights, order = read_file(segmenter / "run" / "best.pt", KIND)["model"], [2, 1, 0]
    config = config_of("--model.num_classes", 3, "--model.init", best)
    head = build_model(config, NAMES[::-1]).decoder.class_head
    assert torch.equal(head.weight, weights["decoder.class_head.weight"][[*order, 3]])
    assert torch.equal(head.bias, weights["decoder.class_head.bias"][[*order, 3]])


def test_a_segmenter_s_other_classes_are_refused(tmp_path, segmenter, capsys):
    best, data = segmenter / "run" / "best.pt", masks(tmp_path / "data", ["ground", "square", "ring"])
    for more in (["--evaluate"], ["--fresh"]):
        code, _, error = scores(capsys, *options(data, tmp_path / "out"), *more, "--model.init", str(best))
        assert code == 2 and "'disc' there, 'ring' here; name the data's classes so, or pass --model.new_cl" in error
        assert error.count("\n") == 1
    new = ["--model.init", str(best), "--model.new_classifier", "true"]
    assert run_command(segment.main, [*options(data, tmp_path / "out"), *new]) == 0


@pytest.mark.parametrize("names", [NAMES[::-1], ["ground", "square", "ring"]])
def test_a_run_goes_on_with_its_own_classes_only(tmp_path, segmenter, names, capsys):
    last = segmenter / "run" / "last.pt"
    arguments = [*options(masks(tmp_path / "data", names), tmp_path / "out"), "--schedule.max_steps", "4"]
    code, _, error = scores(capsys, *arguments, "--resume", str(last))
    assert code == 2 and "knows classes that the data number or name otherwise" in error and str(last) in error
    assert not (tmp_path / "out" / "last.pt").exists()


def colours(root, names):
    """Write a tree of class folders, one plain colour each."""
    for split in ("train", "val"):
        for name, colour in zip(names, COLOURS.values(), strict=True):
            (root / split / name).mkdir(parents=True)
            for number in range(8):
                Image.new("RGB", (40, 40), colour).save(root / split / name / f"{number}.png")
    return root


def words(data, out):
    """Words of a command line that trains on class folders."""
    batch = ["--run.batch_size", "6", "--run.total_batch", "6", "--model.num_classes", "3", "--data.workers", "0"]
    paths = ["--data", str(data), "--run.output", str(out)]
    return ["--config", "digits_smoke", *paths, *batch, "--optim.lr", "5e-3", "--schedule.epochs"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Train a classifier of plain colours, and write its checkpoint with the classes in another order, too."""
    threads, root = torch.get_num_threads(), tmp_path_factory.mktemp("classifier")
    assert classify([*words(colours(root / "data", COLOURS), root / "run"), "12"]) == 0
    torch.set_num_threads(threads)
    state = read_file(root / "run" / "best.pt", CLASSIFIER)
    assert state["classes"] == list(COLOURS)
    turned = {name: value[[2, 0, 1]] if name.startswith("head.") else value for name, value in state["model"].items()}
    write_file(root / "turned.pt", state | {"classes": ["red", "blue", "green"], "model": turned})
    return root


def test_a_classifier_s_classes_are_found_by_name(classifier, capsys):
    shown = []
    for path in (classifier / "run" / "best.pt", classifier / "turned.pt"):
        capsys.readouterr()
        assert run_command(evaluate.main, ["--checkpoint", str(path)]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and shown[0].startswith("top-1 100.00 %")


def test_a_classifier_s_other_classes_are_refused(tmp_path, classifier, capsys):
    data, best = colours(tmp_path / "data", ["crimson", "moss", "navy"]), classifier / "run" / "best.pt"
    for command in (
        lambda: run_command(evaluate.main, ["--checkpoint", str(best), "--data", str(data)]),
        lambda: run_command(classify, [*words(data, tmp_path), "14", "--resume", str(best.with_name("last.pt"))]),
    ):
        capsys.readouterr()
        assert command() == 2
        error = capsys.readouterr().err
        assert "knows classes that the data number or name otherwise: 'blue', 'green', 'red' there, 'crimson'" in error
        assert error.count("\n") == 1


def test_a_classifier_starts_from_weights_by_name(tmp_path, classifier):
    from train.config.loader import load_config
    from train.models.classifier import build_model as build

    config = load_config("digits_smoke", ["--model.num_classes", "3", "--model.init", str(classifier / "turned.pt")])
    weights = read_file(classifier / "run" / "best.pt", CLASSIFIER)["model"]
    assert torch.equal(build(config, list(COLOURS)).head.weight, weights["head.weight"])
    assert not np.allclose(build(config, ["a", "b", "c"]).head.weight.detach(), weights["head.weight"])
