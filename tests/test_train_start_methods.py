"""Trainings whose loader processes are not forked, as on macOS, on Windows and from Python 3.14 on."""

import os
import pickle
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.seg_train_cases import KIND, config_of, fit
from tests.seg_trees import ade20k, bands, cityscapes, folder, instances, packed, panoptic
from tests.test_train_data import config_for, make_folders, make_shards
from tests.test_train_resume import assert_same, start
from train.common.errors import UserError
from train.data import loader as batches
from train.data.classification import open_samples
from train.data.segmentation import open_sets
from train.models.checkpoint import read_file

TINY = ["--schedule.max_steps", 2, "--run.eval_every", 2, "--data.val_length", 2]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_segmenter_trains_and_is_evaluated(tmp_path, method):
    fit(tmp_path / "alone", *TINY)
    fit(tmp_path / method, *TINY, "--data.workers", 1, "--data.start_method", method)
    states = [read_file(tmp_path / name / "last.pt", KIND) for name in ("alone", method)]
    for state in states:
        del state["config"]
    assert_same(*states)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines()[-1] for name in ("alone", method)]
    assert '"kind": "eval"' in logs[0] and logs[0] == logs[1]


TREES = {  # writers of a split
    "folder": lambda root, split: folder(root, [bands(0, 1)] * 4),
    "ade20k": lambda root, split: ade20k(root, [bands(0, 1, 2)], {"train": "training", "val": "validation"}[split]),
    "cityscapes": lambda root, split: cityscapes(root, [bands(7, 26001, dtype=int)], split),
    "instances": lambda root, split: instances(root, [(0, 3, packed(bands(0, 1)), 0)], 1, split),
    "panoptic": lambda root, split: panoptic(root, bands(1, 2, dtype=int), [(1, 1, 0), (2, 184, 0)], split),
}


@pytest.mark.parametrize("resize", ["short_side", "large_jitter", "none"])
@pytest.mark.parametrize("kind", [*TREES, "digits"])
def test_every_source_of_segmentation_can_be_sent_to_a_process(tmp_path, kind, resize):
    data = ["--data", tmp_path, "--data.task", "null"] if kind in TREES else []
    for split in ("train", "val") if data else ():
        TREES[kind](tmp_path, split)
    for samples in open_sets(config_of(*data, "--data.resize", resize, "--data.jitter", "true")):
        assert_alike(samples, pickle.loads(pickle.dumps(samples)))


def test_every_source_of_classification_can_be_sent_to_a_process(tmp_path):
    folders = make_folders(tmp_path / "folders")
    named = open_samples(config_for(folders), "train").source.samples
    for data in (folders, make_shards(tmp_path / "shards", named)):
        for split in ("train", "val"):
            samples = open_samples(config_for(data), split)
            assert_alike(samples, pickle.loads(pickle.dumps(samples)))


def assert_alike(one, other):
    """Compare the first batch of two data sets."""
    first, second = (vars(each.collate([each[0, 0]])) for each in (one, other))
    assert repr(first) == repr(second) and len(one) == len(other)


def test_a_method_that_the_system_lacks_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(UserError, match="data.start_method fork is not to be had on this system: choose from spawn"):
        fit(tmp_path, *TINY, "--data.start_method", "fork")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are listed in /proc")
@pytest.mark.parametrize("method, started", [("spawn", "spawn_main"), ("forkserver", "multiprocessing.forkserver")])
def test_a_signal_to_all_while_loaders_still_import_saves(tmp_path, method, started):
    process = start(tmp_path, "--data.workers", "1", "--data.start_method", method)
    while not any(started in line for line in children(process.pid)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130 and "stopped at epoch 1, step 1 of 4" in errors, errors
    assert "Traceback" not in errors
    assert read_file(tmp_path / "last.pt")["step"] == 1


def children(number):
    """Return the command lines of a process's children."""
    lines = []
    for child in Path(f"/proc/{number}/task/{number}/children").read_text().split():
        with suppress(OSError):
            lines.append(Path(f"/proc/{child}/cmdline").read_bytes().decode(errors="replace"))
    return lines
