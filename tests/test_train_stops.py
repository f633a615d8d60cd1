"""Signals at odd moments, outputs that vanish or cannot be written: a line, and nothing lost."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.test_train_resume import ROOT, start, wait_for_update
from train.common.errors import INTERRUPTED
from train.models.checkpoint import read_file

LONG = ["--schedule.epochs", "500", "--run.log_every", "1", "--run.eval_every", "500", "--data.val_length", "8"]


def pids(number):
    """List a process's descendants."""
    found = []
    with suppress(OSError):
        for child in Path(f"/proc/{number}/task/{number}/children").read_text().split():
            found += [int(child), *pids(child)]
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are listed in /proc")
def test_sigterm_to_every_process_of_a_torchrun_job_saves(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["train.classify", "--config", "digits_smoke", "--run.output", str(tmp_path), *LONG]
    command += ["--run.batch_norm", "frozen", "--run.batch_size", "4", "--run.save_every", "100000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    wait_for_update(process, tmp_path, 6)
    for pid in [*pids(process.pid), process.pid]:  # torchrun then sends a second one to each
        os.kill(pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    state = read_file(tmp_path / "last.pt")
    assert 4 * state["epoch"] + state["step"] >= 6
    assert errors.count(" and saved ") == 1, errors
    assert "train/" not in errors.replace("train/classify", ""), errors  # torchrun's own traceback holds none of ours


def test_a_second_sigterm_does_not_end_a_run_that_saves(tmp_path):
    process = start(tmp_path, *LONG, "--run.save_every", "100000")
    wait_for_update(process, tmp_path, 6)
    for _ in range(5):
        process.terminate()
        time.sleep(0.002)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED and "saved" in errors and "Traceback" not in errors


def test_a_second_ctrl_c_acts_at_once_and_says_what_is_kept(tmp_path, monkeypatch):
    from train.common.errors import Interrupted
    from train.config.loader import load_config
    from train.engine import loop as engine

    def interrupted(run, *rest):
        if run.done == 6:
            raise KeyboardInterrupt
        return honest(run, *rest)

    honest = engine.train_step
    monkeypatch.setattr(engine, "train_step", interrupted)
    with pytest.raises(Interrupted, match="at once, without saving; .*last.pt is kept; .*--resume"):
        engine.train(load_config("digits_smoke", ["--run.output", str(tmp_path / "a"), *LONG]))
    monkeypatch.setattr(engine, "train_step", lambda run, *rest: interrupted(type("At6", (), {"done": 6})))
    with pytest.raises(Interrupted, match="stopped at once: no checkpoint was written yet"):
        engine.train(load_config("digits_smoke", ["--run.output", str(tmp_path / "b"), *LONG]))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="what is loaded is listed in /proc")
def test_ctrl_c_while_a_command_imports_is_a_word(tmp_path):
    process = start(tmp_path, *LONG)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (INTERRUPTED, -signal.SIGINT)
    assert errors.strip().splitlines()[-1:] == ["interrupted"] and "Traceback" not in errors, errors


@pytest.mark.parametrize("tensorboard", ["true", "false"])
def test_an_output_folder_that_is_removed_is_made_again(tmp_path, tensorboard):
    out = tmp_path / "out"
    process = start(out, "--run.log_every", "1", "--schedule.epochs", "5", "--run.tensorboard", tensorboard)
    wait_for_update(process, out, 5)
    shutil.rmtree(out, ignore_errors=True)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 0 and "Traceback" not in errors, errors
    assert read_file(out / "last.pt")["epoch"] == 5


def test_an_output_folder_that_becomes_a_file_is_one_line(tmp_path):
    out = tmp_path / "out"
    process = start(out, *LONG, "--run.tensorboard", "true")
    wait_for_update(process, out, 5)
    out.rename(tmp_path / "moved")
    out.write_text("mine")
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 2 and errors.strip().startswith("error: cannot ") and "Traceback" not in errors, errors
    assert out.read_text() == "mine" and read_file(tmp_path / "moved" / "last.pt")["epoch"] == 1


def test_a_stdout_that_takes_nothing_ends_no_training(tmp_path):
    command = [sys.executable, "-m", "train.classify", "--config", "digits_smoke", "--run.output", str(tmp_path)]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=200)
    assert read_file(tmp_path / "last.pt")["epoch"] == 2
    assert "Traceback" not in ended.stderr


def test_results_into_a_file_are_one_line(tmp_path):
    from train.common.errors import UserError
    from train.data.digits_segmentation import vocabulary
    from train.metrics.submission import create_writer

    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot write .*file: File exists"):
        create_writer("semantic", tmp_path / "file", vocabulary("semantic", "scenes"))
