"""Checkpoints of version 0.1, written before train/ was cut by concern: runs go on from them, predictions are made.

``checkpoints/*.pt.xz`` are those of commit c5a2b46 after 2 of 4 steps, by ``train.classify --config digits_smoke`` and
``train.segment --config digits_panoptic_smoke`` with one block a stage, four channels, eight images a pass.
"""

import json
import lzma
import shutil
from pathlib import Path

import pytest

from train import classify, predict, segment
from train.common.errors import run_command
from train.config.loader import override
from train.config.segmentation import Config
from train.models.checkpoint import SEGMENTER, read_file

FILES = Path(__file__).parent / "checkpoints"
SMALL = "{depths: [1,1,1,1], dims: [4,4,4,4], heads: [1,1,1,1]}"
OPTIONS = {
    "classify": [
        *("--schedule.epochs", "2", "--data.train_length", "16", "--data.val_length", "4", "--run.total_batch", "8"),
        *("--run.batch_size", "8", "--model.overrides", SMALL),
    ],
    "segment": [
        *("--schedule.updates", "4", "--run.eval_every", "2", "--data.train_length", "8", "--data.val_length", "2"),
        *("--judge.top", "7", "--model.backbone", SMALL, "--model.overrides"),
        "{num_queries: 4, hidden_dim: 8, heads: 1, points: 1, encoder_layers: 1, decoder_layers: 1, encoder_ffn: 8, "
        "decoder_ffn: 8}",
    ],
}
COMMANDS = {"classify": (classify, "digits_smoke"), "segment": (segment, "digits_panoptic_smoke")}
LOSSES = {  # of steps 3 and 4, as the commit above logged them when it went on itself
    "classify": [2.309431552886963, 2.3031787872314453],
    "segment": [23.425945281982422, 22.530364990234375],
}


@pytest.fixture
def checkpoint(tmp_path):
    """Unpack a checkpoint: name -> path."""

    def unpack(name):
        path = tmp_path / f"{name}.pt"
        path.write_bytes(lzma.decompress((FILES / f"{name}.pt.xz").read_bytes()))
        return path

    return unpack


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_goes_on_as_it_would_have_then(checkpoint, tmp_path, capsys, name):
    command, config = COMMANDS[name]
    options = [*OPTIONS[name], "--run.output", str(tmp_path / "run"), "--run.log_every", "1"]
    arguments = ["--config", config, "--resume", str(checkpoint(name)), *options]
    assert run_command(command.main, arguments) == 0
    noted = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: unlike")]
    assert noted in ([], ["note: unlike the checkpoint's run: model.num_classes was 16, is None"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in steps] == [3, 4]
    assert [line["loss"] for line in steps] == pytest.approx(LOSSES[name], rel=1e-4)


def test_predictions_are_made(checkpoint, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    shutil.copy(next((Path(__file__).parents[1] / "fast" / "weights" / "nuclei_samples").glob("*.*g")), picture)
    for name in COMMANDS:
        arguments = [str(picture), "--checkpoint", str(checkpoint(name)), "--out", str(tmp_path / name)]
        assert run_command(predict.main, arguments) == 0, capsys.readouterr().err
        assert (tmp_path / name / "picture.json").is_file()


def test_sections_and_options_are_read_under_their_former_names(checkpoint):
    state = read_file(checkpoint("segment"), SEGMENTER)
    assert state["config"]["judge"]["top"] == 7 and "evaluator" not in state["config"]
    assert override(state["config"], [], Config).evaluator.top == 7
    for option in ("--judge.top", "--evaluator.top"):
        config = override(state["config"], [option, "9"], Config)
        assert config.evaluator.top == 9 and config.evaluator.areas == (100, 400)
    for option in ("--schedule.updates", "--schedule.max_steps"):
        config = override(state["config"], [option, "9"], Config)
        assert config.schedule.max_steps == 9 and config.schedule.warmup_steps == 0
    assert Config(schedule={"updates": 5, "warmup_updates": 2}).schedule.warmup_steps == 2
    assert Config(judge={"top": 3}).evaluator.top == 3
    assert Config(judge={"top": 3, "flip": True}, evaluator={"top": 4}).evaluator.model_dump()["top"] == 4
