"""No command writes over a file that it did not write, whatever the file is called."""

import json

import pytest
from matplotlib.figure import Figure

from benchmarks import results, tokens
from benchmarks import run as bench
from tests.test_train_outputs import contents
from train import ablate, classify, demo, demo_classify, export
from train.common.errors import UserError
from train.common.output_files import Outputs
from train.config.loader import load_config
from train.engine import loop
from train.engine.command_line import begin_demo, clear
from train.engine.loop import train
from train.models.checkpoint import write_file


def refused(tmp_path, message, call, *arguments):
    """See that a call is refused and changes nothing in a folder."""
    before = contents(tmp_path)
    with pytest.raises(UserError, match=message):
        call(*arguments)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command, config", [(demo, "digits_panoptic_smoke"), (demo_classify, "digits_smoke")])
@pytest.mark.parametrize("name", ["grid.png", "demo.json"])
def test_a_demonstration_keeps_files_of_its_names(tmp_path, command, config, name):
    (tmp_path / name).write_bytes(b"mine")
    arguments = ["--config", config, "--run.output", str(tmp_path)]
    refused(tmp_path, f"{name} exists and was not written by this command", command.main, arguments)
    refused(tmp_path, f"{name} exists and was not written by this command", command.main, [*arguments, "--fresh"])


def test_a_demonstration_replaces_a_demonstration_only(tmp_path):
    write_file(tmp_path / "last.pt", {})
    refused(tmp_path, "already holds a run", begin_demo, tmp_path, False)
    begin_demo(tmp_path, True)
    assert not (tmp_path / "last.pt").exists()
    write_file(tmp_path / "last.pt", {})  # of the demonstration, which was then interrupted
    begin_demo(tmp_path, False).write("grid.png", b"drawn")
    assert not (tmp_path / "last.pt").exists()
    clear(tmp_path)  # of train.classify --fresh
    write_file(tmp_path / "last.pt", {})
    assert sorted(contents(tmp_path)) == [".autofocusformer.sha256", "last.pt"]
    refused(tmp_path, "already holds a run", begin_demo, tmp_path, False)


def test_going_on_from_a_file_elsewhere_keeps_the_run_that_is_here(tmp_path):
    other, here = tmp_path / "other" / "last.pt", tmp_path / "here"
    arguments = ["--config", "digits_smoke", "--data.val_length", "8", "--schedule.epochs", "1", "--run.output"]
    classify.main([*arguments, str(other.parent)])
    here.mkdir()
    arguments += [str(here), "--resume", str(other)]
    for name, reason in (("log.jsonl", "is no run's log"), ("best.pt", "already holds a run"), ("last.pt", "a run")):
        (here / name).write_bytes(b"mine\n")
        refused(here, reason, classify.main, arguments)
    assert classify.main([*arguments, "--fresh"]) == 0 and other.is_file() and not (here / "best.pt").exists()


def test_a_batch_that_is_not_finite_is_named_where_its_file_is_taken(tmp_path, monkeypatch):
    honest = loop.batch_loss
    monkeypatch.setattr(loop, "batch_loss", lambda *given: honest(*given) * float("nan"))
    (tmp_path / "not_finite.json").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"loss is nan .*images were digits/train/.*not_finite.json exists and was not"):
        train(load_config("digits_smoke", ["--run.output", str(tmp_path)]))
    assert (tmp_path / "not_finite.json").read_bytes() == b"mine"


def test_an_ablation_keeps_a_page_beside_its_table(tmp_path):
    arguments = ["--config", "digits", "--rows", "full", "--seeds", "0", "--out"]
    (tmp_path / "t.md").write_text("my notes\n")
    refused(tmp_path, "t.md is no table of train.ablate", ablate.main, [*arguments, str(tmp_path / "t.csv")])
    refused(tmp_path, "name a .csv file", ablate.main, [*arguments, str(tmp_path / "t.md")])


def test_an_export_keeps_files_of_its_names(tmp_path):
    about = tmp_path / "about.yaml"
    about.write_text(json.dumps(dict.fromkeys(export.TEXTS, "text")))

    def write(*more):
        export.main(["no.pt", "a", "--about", str(about), "--out", str(tmp_path), *more])

    (tmp_path / "a_samples").mkdir()
    (tmp_path / "a_samples" / "holiday.png").write_bytes(b"mine")
    for more in ((), ("--replace",)):
        refused(tmp_path, "a_samples exists and is not ours", write, *more)
    (tmp_path / "a.safetensors").write_bytes(b"ours")
    (tmp_path / "SHA256SUMS").write_text("0  a.safetensors\n")
    refused(tmp_path, "a.safetensors exists: pass --replace", write)
    refused(tmp_path, "a_samples/holiday.png is not ours", write, "--replace")
    (tmp_path / "a_samples" / "holiday.png").unlink()
    refused(tmp_path, "no checkpoint no.pt", write, "--replace")


def test_benchmarks_keep_files_of_others(tmp_path):
    (tmp_path / "cpu.csv").write_text("a,b\n1,2\n")
    arguments = ["--quick", "--only", "nearest clusters", "--out", str(tmp_path / "cpu.csv")]
    refused(tmp_path, "is no table of benchmarks.run", bench.main, arguments)
    arguments = ["nuclei", "--config", "nuclei_nano", "--out", str(tmp_path / "cpu.csv")]
    refused(tmp_path, "cpu.csv exists and was not written by this command", tokens.main, arguments)
    (tmp_path / "plot.png").write_bytes(b"mine")
    refused(tmp_path, "plot.png exists", results.write_picture, tmp_path / "plot.png", Figure())
    for _ in range(2):
        results.write_picture(tmp_path / "new.png", Figure())
    assert Outputs(tmp_path).is_own("new.png")
