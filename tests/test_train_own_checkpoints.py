"""Own checkpoints that are damaged or of data that number their classes otherwise: one line that names the file."""

import copy
import random

import pytest
import torch

from tests.seg_train_cases import KIND as SEGMENTER
from tests.seg_trees import picture, write_png
from train import evaluate, predict, segment, show
from train.classify import main as classify
from train.common.errors import UserError, run_command
from train.models.checkpoint import KIND, read_file, write_file

QUICK = {
    KIND: ["--config", "digits_smoke", "--schedule.epochs", "1", "--data.train_length", "16", "--data.val_length", "4"],
    SEGMENTER: ["--config", "digits_panoptic_smoke", "--schedule.max_steps", "2", "--data.val_length", "1"],
}
MAINS = {KIND: classify, SEGMENTER: segment.main}
COMMANDS = {  # what reads a checkpoint: which kind, which fields it cannot do without, and how it is called
    "resume": (KIND, "config model ema epoch step best optimizer scaler random", classify, ["--resume"]),
    "init": (KIND, "config model", classify, ["--fresh", "--model.init"]),
    "evaluate": (KIND, "config model", evaluate.main, ["--checkpoint"]),
    "name": (KIND, "config model", predict.main, ["--checkpoint"]),
    "show": (KIND, "config model", show.main, ["--checkpoint"]),
    "resume segmenter": (
        SEGMENTER, "config model ema epoch step done best optimizer scaler random vocabulary task", segment.main,
        ["--resume"],
    ),
    "init segmenter": (SEGMENTER, "config model", segment.main, ["--evaluate", "--model.init"]),
    "init backbone": (SEGMENTER, "config model", segment.main, ["--fresh", "--model.backbone_init"]),
    "segment": (SEGMENTER, "config model vocabulary task", predict.main, ["--checkpoint"]),
}  # fmt: skip
ODD = (None, "x", 7.5, [1], {"x": 1}, -1, True)
FITTING = {"ema": (None,), "best": (7.5, -1), "owed": (True,), "classes": (None,), "optimizer": ({"x": 1},)}
FITTING |= {"scaler": ({"x": 1},), "random": ([1],)}  # what is not odd for a field


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Train a little of each kind: the folders."""
    folders, threads = {kind: tmp_path_factory.mktemp("run") for kind in MAINS}, torch.get_num_threads()
    for kind, folder in folders.items():
        assert MAINS[kind]([*QUICK[kind], "--run.output", str(folder), "--run.ema", "0.5"]) == 0
    torch.set_num_threads(threads)
    return folders


def call(command, path, out, capsys):
    """Run a command on a checkpoint; its exit code, having seen that an error is one line that names the file."""
    kind, _, main, options = COMMANDS[command]
    arguments = [*options, str(path)]
    if main in MAINS.values():
        arguments = [*QUICK[kind], "--run.output", str(out), "--run.ema", "0.5", *arguments]
    elif main is not evaluate.main:
        write_png(out / "in.png", picture(0, (32, 32)))
        arguments = [str(out / "in.png"), *arguments, "--out", str(out / ("o.png" if main is show.main else "o"))]
    capsys.readouterr()
    code = run_command(main, arguments)
    error = capsys.readouterr().err
    if code == 2:
        assert error.startswith("error: ") and error.count("\n") == 1 and str(path) in error, error
    return code


@pytest.mark.parametrize("kind", MAINS)
def test_fields_of_another_type_are_named(tmp_path, runs, kind):
    whole, path = read_file(runs[kind] / "last.pt", kind), tmp_path / "a.pt"
    for field in whole.keys() - {"kind"}:
        for value in (each for each in ODD if each not in FITTING.get(field, ())):
            write_file(path, {"kind": kind, field: value})
            with pytest.raises(UserError, match=f"checkpoint {path} is damaged: its '{field}' is not ") as caught:
                read_file(path, kind)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("command", COMMANDS)
def test_fields_that_are_missing_are_named(tmp_path, runs, command, capsys):
    kind, needed, _, _ = COMMANDS[command]
    whole, path = read_file(runs[kind] / "last.pt", kind), tmp_path / "a.pt"
    for field in needed.split():
        write_file(path, {key: each for key, each in whole.items() if key != field})
        assert call(command, path, tmp_path / "out", capsys) == 2, field
        assert not (tmp_path / "out" / "last.pt").exists() and not (tmp_path / "out" / "o").exists()
    write_file(path, whole)
    assert call(command, path, tmp_path / "whole", capsys) == 0


DEEP = [  # wrong further inside
    lambda s: s["config"].update(model={"name": 3}),
    lambda s: s["config"]["model"].update(overrides={"rate": "x"}),
    lambda s: s["config"].update(optim={"freeze": 5}),
    lambda s: s["optimizer"].update(param_groups=[]),
    lambda s: s["optimizer"]["param_groups"][0].update(betas=None),
    lambda s: s["optimizer"]["param_groups"][0].pop("lr"),
    lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.ones(3)),
    lambda s: s["optimizer"].update(state=[1]),
    lambda s: s["random"].__setitem__(0, {}),
    lambda s: s["random"][0].update(torch=torch.ones(3)),
    lambda s: s["random"][0].update(python=(3, (1, 2), None)),
    lambda s: s["random"][0].update(numpy=None),
    lambda s: s["model"].pop(next(iter(s["model"]))),
    lambda s: s["model"].update({next(iter(s["model"])): torch.ones(1)}),
    lambda s: s["ema"].clear() or s["ema"].update(a=torch.ones(1)),
    lambda s: s.update(epoch=10**9),
    lambda s: s.update(kind=7),
]


@pytest.mark.parametrize("kind", MAINS)
@pytest.mark.parametrize("number", range(len(DEEP)))
def test_what_is_wrong_inside_a_field_is_named(tmp_path, runs, kind, number, capsys):
    state = copy.deepcopy(read_file(runs[kind] / "last.pt", kind))
    DEEP[number](state)
    if kind == SEGMENTER and state["epoch"] == 10**9:
        state["done"] = 10**9
    write_file(tmp_path / "a.pt", state)
    command = "resume" if kind == KIND else "resume segmenter"
    if not (isinstance(state["config"].get("model"), dict) and number < 2):  # the config is the command line's
        assert call(command, tmp_path / "a.pt", tmp_path / "out", capsys) == 2
    else:
        assert call("name" if kind == KIND else "segment", tmp_path / "a.pt", tmp_path / "out", capsys) == 2


@pytest.mark.parametrize("kind", MAINS)
def test_a_flipped_bit_anywhere_is_one_line(tmp_path, runs, kind):
    """In every part of the zip file's structure, and in 60 places of the numbers."""
    whole, draw, path = (runs[kind] / "last.pt").read_bytes(), random.Random(0), tmp_path / "last.pt"
    expected = read_file(runs[kind] / "last.pt", kind)
    edges = [*range(0, 400, 9), *range(len(whole) - 4000, len(whole), 67)]
    refused = 0
    for place in [*edges, *(draw.randrange(len(whole)) for _ in range(60))]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            found = read_file(path, kind)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert_alike(found, expected)
    assert refused > 60


def assert_alike(one, other):
    """See that no number is another."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_alike(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_alike(*pair)
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
