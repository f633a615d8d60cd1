"""An evaluation that was interrupted is made on resume, once; what a resumed run should know is said."""

import json

import pytest

from tests.seg_train_cases import config_of
from tests.test_train_data import config_for, make_folders
from tests.test_train_resume import assert_same
from train.common.errors import UserError
from train.config.loader import load_config
from train.engine.loop import train
from train.models.checkpoint import read_file
from train.tasks.classification import Classification
from train.tasks.segmentation import Segmentation

TASKS = {
    "classify": (Classification, lambda *more: load_config("digits_smoke", [*more, "--data.val_length", "8"])),
    "segment": (Segmentation, lambda *more: config_of(*more, "--data.val_length", 2)),
}


class Killed(BaseException):
    """Stands for a kill, which nothing catches."""


@pytest.mark.parametrize("how", ["killed", "stopped"])
@pytest.mark.parametrize("evaluation", [1, 2])  # the second is the last
@pytest.mark.parametrize("kind", TASKS)
def test_an_interrupted_evaluation_is_made_once_on_resume(tmp_path, monkeypatch, kind, evaluation, how):
    make_task, make_config = TASKS[kind]
    whole = make_config("--run.output", str(tmp_path / "whole"))  # saves at every fourth update, as it evaluates
    train(whole, task=make_task(whole))
    config, calls = make_config("--run.output", str(tmp_path / "cut")), []
    honest = make_task.evaluate

    def interrupted(self, run, model, say, stop):
        calls.append(1)
        if len(calls) == evaluation:
            if how == "killed":
                raise Killed
            run.stop.signal = 15
            return {}
        return honest(self, run, model, say, stop)

    monkeypatch.setattr(make_task, "evaluate", interrupted)
    with pytest.raises((Killed, Exception)):
        train(config, task=make_task(config))
    assert read_file(tmp_path / "cut" / "last.pt", make_task.kind)["owed"]
    monkeypatch.setattr(make_task, "evaluate", honest)
    train(config, tmp_path / "cut" / "last.pt", make_task(config))
    logs = []
    for name in ("whole", "cut"):
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        logs.append([line for line in lines if line["kind"] == "eval"])
        assert [line["step"] for line in logs[-1]] == [4, 8]
        updates = [line["step"] for line in lines if line["kind"] == "train"]
        assert updates == sorted(set(updates))
    assert logs[0] == logs[1]
    for name in ("last.pt", "best.pt"):
        states = [read_file(tmp_path / folder / name, make_task.kind) for folder in ("whole", "cut")]
        for state in states:
            del state["config"]
        assert_same(*states)


def test_drafts_that_killed_runs_left_are_removed(tmp_path):
    drafts = [tmp_path / f".{name}.123.tmp" for name in ("last.pt", "best.pt", "log.jsonl")]
    for draft in drafts:
        draft.write_bytes(b"half")
    (tmp_path / ".mine.tmp").write_bytes(b"not ours")
    train(
        load_config("digits_smoke", ["--run.output", str(tmp_path), "--schedule.epochs", "1", "--data.val_length", "8"])
    )
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".mine.tmp"]


def test_going_on_with_fewer_images_is_said_or_refused(tmp_path, capsys):
    data, out = make_folders(tmp_path / "data", each=4), ["--run.output", str(tmp_path / "out")]
    train(config_for(data, *out, "--schedule.epochs", "2"))
    for label in range(3):
        sorted((data / "train" / f"class{label}").iterdir())[0].unlink()
    capsys.readouterr()
    last = tmp_path / "out" / "last.pt"
    train(config_for(data, *out, "--schedule.epochs", "4"), last)
    assert "was trained on 12 images, and there are 9 now" in capsys.readouterr().out
    with pytest.raises(UserError, match="was saved at .*, but there are 2 steps in an epoch and 2 in all now"):
        train(config_for(data, *out, "--schedule.epochs", "1"), last)


@pytest.mark.parametrize("damage", [b"\xff\xfe\n", b"[1]\n", b"7\n", b'{"kind": "train"', b"[" * 10**5 + b"\n"])
def test_a_damaged_line_of_the_log_is_cut_and_said(tmp_path, capsys, damage):
    config = load_config("digits_smoke", ["--run.output", str(tmp_path), "--data.val_length", "8"])
    train(config)
    log = tmp_path / "log.jsonl"
    before = log.read_bytes()
    log.write_bytes(damage if damage.endswith(b"\n") else before + damage)
    capsys.readouterr()
    train(config, tmp_path / "last.pt")
    assert "1 damaged line(s)" in capsys.readouterr().out
    assert all(isinstance(json.loads(line), dict) for line in log.read_bytes().splitlines())
