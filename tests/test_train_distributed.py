"""Two processes with half the batch each make the step of one process with the whole batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from train.common.distributed import Ranks
from train.common.errors import UserError
from train.config.loader import load_config
from train.engine.loop import train
from train.engine.run import Run
from train.engine.state import set_batch_norm
from train.models.checkpoint import read_file
from train.tasks.classification import Classification

ROOT = Path(__file__).parents[1]
# A batch norm would see half batches, so it is frozen here (on GPUs, run.batch_norm sync sees the whole).
OPTIONS = ["--run.batch_norm", "frozen", "--data.val_length", "11", "--optim.clip", "0.01"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_two_processes_equal_one_with_the_joined_batch(tmp_path):
    options = ["--config", "digits_smoke", *OPTIONS, "--run.output", str(tmp_path / "two"), "--run.batch_size", "4"]
    command = [*TORCHRUN, "-m", "train.classify", *options]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    assert "16 = 4 x 2 process(es) x 2 accumulation step(s)" in ended.stdout
    assert ended.stdout.count("training and 11 validation images") == 1, "one process speaks"
    run = train(load_config("digits_smoke", [*OPTIONS, "--run.output", str(tmp_path / "one")]))
    two, one = (read_file(tmp_path / name / "last.pt") for name in ("two", "one"))
    assert len(two["random"]) == 2
    config = load_config("digits_smoke", OPTIONS)
    start = Run(config, Ranks("cpu"), Classification(config)).model.state_dict()
    moved = {name: (weight - start[name]).abs().max().item() for name, weight in one["model"].items()}
    assert max(moved.values()) > 1e-3
    for name, weight in one["model"].items():
        assert torch.allclose(two["model"][name], weight, rtol=0, atol=2e-6), name
    lines = [(tmp_path / name / "log.jsonl").read_text().splitlines()[-1] for name in ("two", "one")]
    assert all('"images": 11' in line for line in lines), "no image counted twice"
    assert run.done == 8


def test_sync_batch_norm_needs_gpus_and_says_so():
    ranks = Ranks("cpu")
    ranks.size = 2
    with pytest.raises(UserError, match="sync needs GPUs.*frozen or local"):
        set_batch_norm(torch.nn.BatchNorm2d(3), "sync", ranks)


def test_batch_that_cannot_be_shared_is_one_line():
    with pytest.raises(UserError, match="run.total_batch 16 is no multiple of run.batch_size 6 x 1 processes"):
        train(load_config("digits_smoke", ["--run.batch_size", "6"]))
