"""Nothing is written over an input, or over a file that is not as we wrote it."""

import json
import os
import subprocess

import numpy as np
import pytest
from PIL import Image

from tests.seg_train_cases import KIND, config_of, model_of
from tests.seg_trees import picture, write_png
from train import predict, show
from train.common.errors import UserError, run_command
from train.common.output_files import MANIFEST, Outputs
from train.data.digits_segmentation import vocabulary
from train.data.segmentation import pack_vocabulary
from train.metrics.submission import create_writer
from train.models.checkpoint import write_file


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Write a checkpoint of an untrained segmenter."""
    config, path = config_of("--model.num_classes", 16), tmp_path_factory.mktemp("weights") / "best.pt"
    state = {"kind": KIND, "config": config.model_dump(mode="json"), "model": model_of().state_dict(), "ema": None}
    write_file(path, state | {"task": "panoptic", "vocabulary": pack_vocabulary(vocabulary("panoptic"))})
    return str(path)


def test_what_we_wrote_may_be_replaced_and_nothing_else(tmp_path):
    first = Outputs(tmp_path / "out")
    first.write("a.txt", b"one")
    first.write("deep/b.txt", b"two")
    again = Outputs(tmp_path / "out")
    again.check(["a.txt", "deep/b.txt", "new.txt"])
    again.write("a.txt", b"three")
    assert (tmp_path / "out" / "a.txt").read_bytes() == b"three"
    (tmp_path / "out" / "deep" / "b.txt").write_bytes(b"edited")
    (tmp_path / "out" / "mine.txt").write_bytes(b"mine")
    os.symlink(tmp_path / "out" / "mine.txt", tmp_path / "out" / "link.txt")
    os.symlink(tmp_path / "nowhere", tmp_path / "out" / "dangling.txt")
    for name, reason in (
        ("deep/b.txt", "was changed since it was written"),
        ("mine.txt", "was not written by this command"),
        ("link.txt", "was not written by this command"),
        ("dangling.txt", "was not written by this command"),
    ):
        for outputs in (again, Outputs(tmp_path / "out")):
            with pytest.raises(UserError, match=f"{name} exists and {reason}: name another folder"):
                outputs.write(name, b"ours")
    assert (tmp_path / "out" / "mine.txt").read_bytes() == b"mine" and not (tmp_path / "nowhere").exists()
    (tmp_path / "out" / "deep" / "b.txt").write_bytes(b"two")
    check = subprocess.run(["sha256sum", "-c", MANIFEST], cwd=tmp_path / "out", capture_output=True, text=True)
    assert "deep/b.txt: OK" in check.stdout and "a.txt: OK" in check.stdout
    assert sorted(each.name for each in (tmp_path / "out").iterdir() if each.name.endswith(".tmp")) == []


def test_inputs_are_not_written_over_even_if_we_wrote_them(tmp_path):
    Outputs(tmp_path).write("a.png", b"one")
    os.link(tmp_path / "a.png", tmp_path / "hard.png")
    os.symlink(tmp_path / "a.png", tmp_path / "soft.png")
    for name in ("a.png", "hard.png", "soft.png"):
        with pytest.raises(UserError, match=f"{name} is an input and is not written over"):
            Outputs(tmp_path, [tmp_path / "soft.png"]).write(name, b"two")
    assert (tmp_path / "a.png").read_bytes() == b"one"


def test_a_broken_list_of_what_we_wrote_protects(tmp_path):
    Outputs(tmp_path).write("a.png", b"one")
    (tmp_path / MANIFEST).write_bytes(b"\xff\xfe\n\nno list a.png")
    with pytest.raises(UserError, match="a.png exists and was not written"):
        Outputs(tmp_path).write("a.png", b"two")


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot write .*file/a.png"):
        Outputs(tmp_path / "file").write("a.png", b"one")
    (tmp_path / "out" / "taken").mkdir(parents=True)
    with pytest.raises(UserError, match="taken exists"):
        Outputs(tmp_path / "out").write("taken", b"one")
    with pytest.raises(UserError, match="cannot write"):
        Outputs(tmp_path / "out").write("x" * 300, b"one")
    assert {each.name for each in (tmp_path / "out").iterdir()} == {"taken", MANIFEST}


def contents(folder):
    """Read all files of a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_predict_keeps_photographs_and_labels(tmp_path, weights, capsys, kind, monkeypatch):
    write_png(tmp_path / f"holiday.{kind}", picture(0))
    write_png(tmp_path / f"a.{kind}", picture(1))
    (tmp_path / "holiday.json").write_text('{"shapes": ["hours of labelling"]}')
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path)
    for path, out in ((tmp_path, tmp_path), (tmp_path / f"holiday.{kind}", "."), (".", ".")):
        arguments = [str(path), "--checkpoint", weights, "--out", str(out)]
        assert run_command(predict.main, arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert "input and is not written over" in error if kind == "png" else "holiday.json exists" in error
        assert contents(tmp_path) == before


def test_predict_replaces_its_own_and_does_not_segment_them(tmp_path, weights, capsys):
    for number in range(2):
        write_png(tmp_path / "in" / f"{number}.jpg", picture(number))
    for out in (tmp_path / "in", tmp_path / "in" / "predictions"):
        for _ in range(2):
            assert run_command(predict.main, [str(tmp_path / "in"), "--checkpoint", weights, "--out", str(out)]) == 0
            assert "2 pictures" in capsys.readouterr().out
        assert json.loads((out / "0.json").read_text())["size"] == [40, 60]
    (tmp_path / "in" / "0.json").write_text("corrected by hand")
    assert (
        run_command(predict.main, [str(tmp_path / "in"), "--checkpoint", weights, "--out", str(tmp_path / "in")]) == 2
    )
    assert "0.json exists and was changed since it was written" in capsys.readouterr().err
    assert (tmp_path / "in" / "0.json").read_text() == "corrected by hand"


def test_pictures_whose_results_would_have_one_name_get_two(tmp_path):
    for name in ("a.png", "a.bmp", "a.png.png"):
        write_png(tmp_path / name, picture(0))
    found = predict.find_pictures(tmp_path, tmp_path / "out")
    assert {name: path.name for name, path in found.items()} == {each: each for each in ("a.png", "a.bmp", "a.png.png")}


def test_show_keeps_a_picture_called_tokens(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_png(tmp_path / "tokens.png", picture(0))
    write_png(tmp_path / "a.png", picture(0))
    before = contents(tmp_path)
    for name, reason in (("tokens.png", "is an input"), ("a.png", "tokens.png exists and was not written")):
        assert run_command(show.main, [name, "--model", "aff_nano", "--size", "32"]) == 2
        assert reason in capsys.readouterr().err and contents(tmp_path) == before
    for _ in range(2):
        assert run_command(show.main, ["a.png", "--model", "aff_nano", "--size", "32", "--out", "new.png"]) == 0
    with Image.open("new.png") as drawing:
        assert drawing.format == "PNG" and min(drawing.size) > 300


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_results_in_official_formats_do_not_replace_masks(tmp_path, task):
    classes = vocabulary("panoptic")
    own = {"semantic": "a.png", "panoptic": "panoptic_val_results.json", "instance": "detections_val_results.json"}[
        task
    ]
    (tmp_path / own).write_bytes(b"mine")
    with pytest.raises(UserError, match=f"{own} exists and was not written by this command"):
        writer = create_writer(task, tmp_path, classes)
        writer.add("a", np.zeros((4, 4), dtype=np.int64))
    assert (tmp_path / own).read_bytes() == b"mine"
