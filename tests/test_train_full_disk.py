"""Disks that fill up: one line that names the file, and what was there before is as it was."""

import resource
import shutil
import signal
from contextlib import contextmanager

import numpy as np
import pytest

from tests.seg_trees import picture, write_png
from tests.test_train_outputs import contents
from train import prepare
from train.ablation.table import NUMBERS, append_run, write_table
from train.common.errors import UserError
from train.common.output_files import MANIFEST, Outputs, write_whole
from train.config.loader import load_config
from train.engine.loop import train
from train.engine.run import Run
from train.models.checkpoint import read_file

FULL = "No space left on device|File too large"


@contextmanager
def file_size_limit(size):
    """Let no file grow beyond so many bytes: to who writes, a disk that is full."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def config_of(folder, *more):
    return load_config("digits_smoke", ["--run.output", str(folder), "--data.val_length", "8", *more])


@pytest.fixture(scope="module")
def epoch(tmp_path_factory):
    """Train for an epoch of two."""
    folder = tmp_path_factory.mktemp("epoch")
    train(config_of(folder, "--schedule.epochs", "1"))
    return folder


@pytest.mark.parametrize("kind", ["device", "file"])
def test_a_log_that_takes_nothing_more_is_one_line(tmp_path, epoch, kind):
    shutil.copytree(epoch, tmp_path, dirs_exist_ok=True)
    log = tmp_path / "log.jsonl"
    before, lines = (tmp_path / "last.pt").read_bytes(), log.read_bytes()
    if kind == "device":
        log.unlink()
        log.symlink_to("/dev/full")
    with (
        pytest.raises(UserError, match=f"^cannot write {log}: ({FULL})$"),
        file_size_limit(len(lines) + 100 if kind == "file" else 1 << 30),
    ):
        train(config_of(tmp_path, "--schedule.epochs", "2"), tmp_path / "last.pt")
    assert (tmp_path / "last.pt").read_bytes() == before
    if kind == "file":  # half a line was written
        assert log.read_bytes().startswith(lines) and not log.read_bytes().endswith(b"\n")
        run = train(config_of(tmp_path, "--schedule.epochs", "2"), tmp_path / "last.pt")
        assert run.done == 8 and log.read_bytes().startswith(lines) and log.read_bytes().count(b'"eval"') == 2


def test_a_checkpoint_that_does_not_fit_keeps_the_one_before(tmp_path, epoch):
    shutil.copytree(epoch, tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "last.pt").read_bytes()
    with (
        pytest.raises(UserError, match=f"cannot save {tmp_path}/last.pt: ({FULL}); the one before"),
        file_size_limit(1 << 16),
    ):
        train(config_of(tmp_path, "--schedule.epochs", "2"), tmp_path / "last.pt")
    assert (tmp_path / "last.pt").read_bytes() == before and read_file(tmp_path / "last.pt")["epoch"] == 1
    assert not list(tmp_path.glob(".*.tmp"))


def test_tensorboard_that_cannot_write_ends_no_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Run, "save", lambda run: None)
    monkeypatch.setattr(Run, "save_best", lambda *given, **named: None)
    (tmp_path / "log.jsonl").symlink_to("/dev/null")
    with file_size_limit(200):
        run = train(config_of(tmp_path, "--run.tensorboard", "true", "--run.log_every", "1"))
    assert run.done == 8 and "note: TensorBoard's files cannot be written any more" in capsys.readouterr().out


def test_results_that_do_not_fit_leave_what_was_there(tmp_path):
    Outputs(tmp_path).write("a.png", b"small")
    for name, size in (("a.png", 4096), ("new/b.json", 4096)):
        with pytest.raises(UserError, match=f"cannot write {tmp_path}/{name}: .*({FULL})"), file_size_limit(size // 2):
            Outputs(tmp_path).write(name, b"x" * size)
    with pytest.raises(UserError, match=FULL), file_size_limit(100):  # the list of what we wrote takes no further line
        Outputs(tmp_path).write("a.png", b"other")
    assert (tmp_path / "a.png").read_bytes() == b"small"
    assert {name for name in contents(tmp_path)} == {"a.png", MANIFEST}


def test_tables_and_data_that_do_not_fit_leave_what_was_there(tmp_path):
    run = dict.fromkeys(NUMBERS, 1.0) | {"settings": "s", "machine": "m", "versions": "v", "row": "full"}
    table, page = tmp_path / "t.csv", tmp_path / "t.md"
    append_run(table, run | {"seed": 0})
    write_table(table, ["full"], "command")
    page.write_text(page.read_text() + "\n## Reading\n\nMine.\n")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"cannot write {page}: .*({FULL})"), file_size_limit(64):
        write_table(table, ["full"], "command")
    with pytest.raises(UserError, match=f"cannot write {table}: ({FULL})"), file_size_limit(len(before["t.csv"])):
        append_run(table, run | {"seed": 1})
    with pytest.raises(UserError, match=FULL), file_size_limit(64):
        write_whole(page, b"x" * 100)
    assert contents(tmp_path) == before
    write_png(tmp_path / "in" / "a" / "images" / "a.png", picture(0))
    write_png(tmp_path / "in" / "a" / "masks" / "1.png", np.full((40, 60), 255, np.uint8))
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/out: .*({FULL})"), file_size_limit(64):
        prepare.main(["masks", str(tmp_path / "in"), str(tmp_path / "out"), "--category", "cell"])
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*.tmp"))
