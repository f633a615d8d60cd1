"""A run that was killed, stopped or could not save loses nothing."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.test_train_data import make_folders
from train.classify import main
from train.common.errors import UserError
from train.config.loader import load_config
from train.engine import loop as engine
from train.engine.log import drop_beyond, read_line
from train.engine.loop import train
from train.models import checkpoint
from train.models.checkpoint import KIND, read_file, write_file

ROOT = Path(__file__).parents[1]
EVERYTHING_RANDOM = [
    *("--augment.mixup", "0.8", "--augment.cutmix", "1.0", "--model.drop_path", "0.3", "--run.ema", "0.9"),
    *("--data.workers", "2", "--run.total_batch", "8", "--run.batch_size", "4", "--run.log_every", "1"),
    *("--run.save_every", "3", "--data.val_length", "10"),
]


def start(folder, *arguments):
    """Start a short training that Ctrl-C reaches, also where a shell that runs us in the background ignores it."""
    command = [sys.executable, "-m", "train.classify", "--config", "digits_smoke", "--run.output", str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with heeded(signal.SIGINT):
        return subprocess.Popen([*command, *arguments], cwd=ROOT, start_new_session=True, **pipes)


@contextmanager
def heeded(number):
    """Let processes started meanwhile have a signal's default: one that is ignored is inherited so."""
    former = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(number, former)


def wait_for_update(process, folder, update):
    """Wait until the log of a run shows an update."""
    log, deadline = Path(folder) / "log.jsonl", time.monotonic() + 90
    while not (log.exists() and f'"train", "step": {update},' in log.read_text(encoding="utf-8")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)


def assert_same(one, other):
    """Compare nested containers, tensors bit by bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def test_killed_and_resumed_equals_never_killed_bit_for_bit(tmp_path):
    folders = make_folders(tmp_path / "images", each=22)
    options = [*EVERYTHING_RANDOM, "--data", str(folders), "--model.num_classes", "3", "--augment.erasing", "0.5"]
    options += ["--augment.randaugment", "rand-m9-mstd0.5-inc1"]
    process = start(tmp_path / "killed", *options)
    wait_for_update(process, tmp_path / "killed", 5)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    left = read_file(tmp_path / "killed" / "last.pt")
    assert left["epoch"] == 0 and 0 < left["step"] < 8, "killed in the middle of an epoch"
    resumed = start(tmp_path / "killed", *options, "--resume")
    text, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, errors
    assert f"epoch 1, step {left['step']} of 8" in text
    train(load_config("digits_smoke", [*options, "--run.output", str(tmp_path / "whole")]))
    states = [read_file(tmp_path / name / "last.pt") for name in ("killed", "whole")]
    for state in states:
        del state["config"]
    assert_same(*states)
    lines = [json.loads(line) for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 17))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, number):
    process = start(tmp_path, *EVERYTHING_RANDOM, "--schedule.epochs", "50", "--run.save_every", "1000")
    wait_for_update(process, tmp_path, 2)
    os.killpg(process.pid, number)  # as a terminal does: the loader processes get it too
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "saved" in errors and "--resume" in errors and "Traceback" not in errors
    assert read_file(tmp_path / "last.pt")["step"] >= 2


def small_state(value):
    return {"kind": KIND, "value": value, "tensor": torch.arange(4000.0)}


def test_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    write_file(path, small_state(1))

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; the one before is kept: .*last.pt") as caught:
        write_file(path, small_state(2))
    assert "\n" not in str(caught.value)
    assert read_file(path)["value"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_checkpoint_is_named_and_the_previous_kept(tmp_path, damage, capsys):
    path = tmp_path / "last.pt"
    write_file(path, small_state(1))
    write_file(path, small_state(2))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    with pytest.raises(UserError, match=f"damaged.*checkpoint is kept: {tmp_path}/previous.pt"):
        main(["--config", "digits_smoke", "--run.output", str(tmp_path), "--resume"])
    assert read_file(tmp_path / "previous.pt")["value"] == 1


class Evil:
    def __reduce__(self):
        return os.system, ("echo executed > executed",)


def test_checkpoint_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"kind": KIND, "model": Evil()}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="refused"):
        read_file(tmp_path / "last.pt")
    assert not (tmp_path / "executed").exists()


def test_a_run_is_not_overwritten_unasked(tmp_path):
    write_file(tmp_path / "last.pt", small_state(1))
    with pytest.raises(UserError, match="already holds a run: add --resume"):
        main(["--config", "digits_smoke", "--run.output", str(tmp_path)])


@pytest.mark.parametrize("content", [b'{"event": "mine"}\n', b"my notes\n", b"\xff\xfe"])
def test_a_log_of_someone_else_is_kept(tmp_path, content):
    log = tmp_path / "log.jsonl"
    log.write_bytes(content)
    with pytest.raises(UserError, match="log.jsonl is no run's log: name another --run.output"):
        main(["--config", "digits_smoke", "--run.output", str(tmp_path)])
    assert log.read_bytes() == content
    log.write_text('{"kind": "run", "update": 0}\n{"kind": "tra')  # of a run killed before its first checkpoint
    assert main(["--config", "digits_smoke", "--run.output", str(tmp_path), "--schedule.epochs", "1"]) == 0


def test_a_log_that_says_update_goes_on_in_steps(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(f'{{"kind": "eval", "update": {n}, "top1": 0.{n}}}\n' for n in (1, 2, 3)))
    assert drop_beyond(log, 2) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines == [{"kind": "eval", "step": n, "top1": n / 10} for n in (1, 2)]
    assert read_line(b'{"kind": "run", "update": "1"}') is None


@pytest.mark.parametrize("where", ["loss", "gradient norm"])
def test_loss_not_finite_stops_and_saves_the_batch(tmp_path, monkeypatch, where):
    config = load_config("digits_smoke", ["--run.output", str(tmp_path)])
    honest, calls = engine.batch_loss, []

    def spoilt(run, *rest):
        calls.append(1)
        loss, rooted = honest(run, *rest), (0 * run.model.head.weight).abs().sqrt().sum()  # 0, with no gradient there
        if len(calls) < 3:
            return loss
        return loss * float("nan") if where == "loss" else loss + rooted

    monkeypatch.setattr(engine, "batch_loss", spoilt)
    with pytest.raises(UserError, match=f"{where} is nan at epoch 1, step 2 .learning rate") as caught:
        train(config)
    assert "\n" not in str(caught.value)
    report = json.loads((tmp_path / "not_finite.json").read_text())
    assert report["step"] == 2 and report["lr"] > 0
    assert len(report["images"]) == 16 and report["images"][0].startswith("digits/train/")
