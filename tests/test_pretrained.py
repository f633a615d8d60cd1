"""Weights that ship: every file is what its card says; a network stays the same; bad ones are named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import fast
import fast.pretrained
from fast.checkpoints import CheckpointError
from tests.shipped_cases import MACHINE_PATH, check_shipped, export_stand_in, train_stand_ins
from train import evaluate, export, predict, segment, show
from train.common.errors import UserError, run_command
from train.data.mask_files import read_picture
from train.models.pretrained import read_header

ROOT = Path(__file__).parent.parent
IMAGES = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
KINDS = ("digits", "scattered", "squares")


@pytest.mark.parametrize("name", fast.list_pretrained())
def test_every_file_that_ships(name):
    check_shipped(name)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Checkpoints of stand-ins by name, and the folder that they were exported to."""
    root = tmp_path_factory.mktemp("shipped")
    checkpoints, folder = train_stand_ins(root), root / "weights"
    for name, samples in (("digits", "40"), ("scattered", "3"), ("squares", "p2,p3")):
        assert export_stand_in(checkpoints[name], name, folder, "--samples", samples) == 0
    return checkpoints, folder


@pytest.fixture
def shipped(exported, tmp_path, monkeypatch):
    """A copy of that folder, in place of the package's; it may be changed."""
    monkeypatch.setattr(fast.pretrained, "FOLDER", Path(shutil.copytree(exported[1], tmp_path / "weights")))
    return fast.pretrained.FOLDER


def make(name, **overrides):
    """Make a stand-in's model, for evaluation."""
    create = fast.create_model if name == "digits" else fast.create_segmenter
    return create(pretrained=name, **overrides).eval()


@torch.no_grad()
def outputs(model):
    """The tensors that a model gives for IMAGES."""
    found = model(IMAGES)
    return [found] if isinstance(found, torch.Tensor) else [found.class_queries_logits, found.masks_queries_logits]


def test_stand_ins_hold_to_it(shipped):
    assert fast.list_pretrained() == list(KINDS)
    for name in KINDS:
        check_shipped(name)
    assert fast.pretrained_facts("squares")["samples"]["scores"]["AP"] > 50
    assert fast.pretrained_facts("squares")["classes"] == ["square"]
    assert fast.pretrained_facts("digits")["classes"] == list("0123456789")


def rewrite(folder, name, change):
    """Change a file's header and list its new checksum."""
    path = folder / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    facts = read_header(path)
    change(facts, weights)
    save_file(weights, path, {fast.pretrained.HEADER: json.dumps(facts)})
    relist(folder)


def relist(folder):
    """Write SHA256SUMS and the cards' checksums anew, as somebody would who wanted the check to pass."""
    old = fast.pretrained._sums()
    new = {file: fast.pretrained.hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in old}
    (folder / "SHA256SUMS").write_text("".join(f"{checksum}  {file}\n" for file, checksum in new.items()))
    for card in folder.glob("*.md"):
        text = card.read_text()
        for file, checksum in old.items():
            text = text.replace(checksum, new[file])
        card.write_text(text)


def worse(facts, weights):
    """Turn every mask inside out."""
    for key in ("decoder.mask_head.2.weight", "decoder.mask_head.2.bias"):
        weights[key] = -weights[key]


def braggart(facts, weights):
    facts["samples"]["scores"]["AP"] += 2


def traveller(facts, weights):
    facts["trained"]["config"]["run"]["output"] = "/home/me/run"


@pytest.mark.parametrize("change", [worse, braggart, traveller])
def test_the_check_sees_what_is_wrong(shipped, change):
    check_shipped("squares")
    rewrite(shipped, "squares", change)
    with pytest.raises(AssertionError):
        check_shipped("squares")


@pytest.mark.parametrize("old", ["## Limits", "## Licence\n\nCC0", "parameters"])
def test_the_check_reads_the_card(shipped, old):
    card = shipped / "squares.md"
    card.write_text(card.read_text().replace(old, old.partition("\n")[0] if "\n" in old else ""))
    with pytest.raises((AssertionError, ValueError)):
        check_shipped("squares")


@pytest.mark.parametrize("name", KINDS)
def test_a_network_is_the_same_after_export(exported, shipped, tmp_path, name):
    """Stored as float32 to the bit; as float16 to the rounding of its matrices."""
    state = torch.load(exported[0][name], weights_only=True)["model"]
    assert (
        export_stand_in(exported[0][name], name, shipped, "--samples", "0", "--replace", "--precision", "float32") == 0
    )
    whole = make(name)
    assert all(torch.equal(value, state[key]) for key, value in whole.state_dict().items())
    shutil.copytree(exported[1], shipped, dirs_exist_ok=True)
    rounded = make(name)
    for key, value in rounded.state_dict().items():
        stored = state[key].half().float() if state[key].ndim > 1 else state[key]
        assert torch.equal(value, stored) and value.dtype == state[key].dtype
    for exact, near in zip(outputs(whole), outputs(rounded), strict=True):
        assert 0 < (exact - near).abs().max() < 0.2 * exact.abs().max()


def test_what_is_exported_names_no_path_and_no_start(exported, shipped):
    for name in KINDS:
        text = (shipped / f"{name}.safetensors").read_bytes().decode("latin-1")
        assert str(exported[1].parent) not in text and not MACHINE_PATH.search(text)
        assert "init" not in fast.pretrained_facts(name)["trained"]["config"]["model"]


def test_another_number_of_classes_has_a_new_classifier(shipped):
    own, other = make("digits"), make("digits", num_classes=3, drop_path=0.1)
    assert other(IMAGES).shape == (2, 3) and make("digits", num_classes=0)(IMAGES).shape == (2, 24)
    assert torch.equal(own.forward_features(IMAGES), other.forward_features(IMAGES))
    own, other = make("squares"), make("squares", num_classes=5)
    assert torch.equal(outputs(own)[1], outputs(other)[1]) and outputs(other)[0].shape[2] == 6


def test_a_backbone_of_either_kind(shipped):
    backbone = fast.create_model("aff_nano", features_only=True, pretrained="squares").eval()
    sets, expected = backbone(IMAGES), make("squares").backbone(IMAGES)
    assert all(torch.equal(a.features, b.features) for a, b in zip(sets, expected, strict=True))
    found, _ = fast.create_model(features_only=True, pretrained=True).eval().run_stages(IMAGES)
    stages = make("digits").forward_features(IMAGES, return_stages=True)[1]
    assert all(torch.equal(a.features, b.features) for a, b in zip(found, stages, strict=True))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: fast.create_model(pretrained="nope"), "no weights 'nope' ship.*: digits .classifier, aff_nano., scat"),
        (lambda: fast.create_model("aff_mini", pretrained="digits"), "are of aff_nano, not of aff_mini"),
        (lambda: fast.create_model("aff_mini", pretrained=True), "0 classifiers of aff_mini: none"),
        (lambda: fast.create_segmenter(pretrained=True), "2 segmenters: scattered, squares; name some"),
        (lambda: fast.create_model(pretrained="squares"), "weights of a segmenter: use create_segmenter"),
        (lambda: fast.create_segmenter(pretrained="digits"), "weights of a classifier: use create_model"),
        (lambda: fast.create_model(pretrained="digits", alpha=8), "alpha=8 contradicts the weights 'digits'.* 4.0"),
        (lambda: fast.create_model(pretrained="digits", alhpa=8), "did you mean 'alpha'"),
        (lambda: fast.create_segmenter(pretrained="squares", num_queries=9), "num_queries=9 contradicts"),
        (lambda: fast.create_segmenter(pretrained="squares", backbone_overrides={"rate": 0.2}), "rate=0.2 contradicts"),
        (lambda: fast.create_segmenter(pretrained="squares", head="hcformer"), "have a mask2former head"),
        (lambda: fast.create_segmenter(make("squares").backbone, pretrained="squares"), "bring their own backbone"),
    ],
)
def test_what_does_not_fit_is_named(shipped, call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_settings_equal_to_the_weights_do_not_contradict(shipped):
    assert make("digits", alpha=4, dims=(8, 16, 16, 24)).config.dims == (8, 16, 16, 24)


@pytest.mark.parametrize("place", [0, 200, -1])
def test_a_changed_file_is_refused(shipped, place, capsys):
    path = shipped / "digits.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        fast.create_model(pretrained="digits")
    assert run_command(show.main, ["--pretrained", "digits", "--out", str(shipped / "a.png")]) == 2
    assert "SHA-256 differs" in capsys.readouterr().err
    path.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        fast.create_model(pretrained="digits")
    with pytest.raises(ValueError, match="digits .missing."):
        fast.create_model(pretrained="nope")


def test_nothing_ships(tmp_path, monkeypatch):
    monkeypatch.setattr(fast.pretrained, "FOLDER", tmp_path)
    assert fast.list_pretrained() == []
    with pytest.raises(ValueError, match="there are: none"):
        fast.create_model(pretrained="digits")


def test_pictures_are_segmented_and_named(shipped, tmp_path, capsys):
    picture = str(shipped / "squares_samples" / "p2.png")
    for weights in (["--pretrained", "squares"], ["--checkpoint", str(shipped / "squares.safetensors")]):
        assert run_command(predict.main, [picture, *weights, "--out", str(tmp_path / "out")]) == 0
        found = json.loads((tmp_path / "out" / "p2.json").read_text())
        assert found["task"] == "instance" and [each["name"] for each in found["segments"]] == ["square"]
    assert run_command(predict.main, [picture, "--pretrained", "digits", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "p2.json").read_text())["classes"][0]["name"] in "0123456789"
    capsys.readouterr()
    for other in ("--checkpoint", "--official"):
        assert run_command(predict.main, [picture, "--pretrained", "digits", other, "x.pt"]) == 2
        assert f"give --pretrained or {other}, not both" in capsys.readouterr().err
    assert run_command(predict.main, [picture, "--pretrained", "nope"]) == 2
    assert "no weights 'nope' ship with this package; there are: digits" in capsys.readouterr().err


def test_the_other_commands_take_a_name(shipped, tmp_path, capsys):
    assert run_command(show.main, ["--pretrained", "digits", "--size", "64", "--out", str(tmp_path / "a.png")]) == 0
    assert run_command(evaluate.main, ["--pretrained", "digits"]) == 0
    scores = fast.pretrained_facts("digits")["scores"]
    assert f"top-1 {scores['top1']:.2f} %" in capsys.readouterr().out
    config = ["--config", "digits_panoptic_smoke", "--run.output", str(tmp_path / "run")]
    assert run_command(segment.main, [*config, "--evaluate", "--model.init", "scattered"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert f"{'PQ':16} {fast.pretrained_facts('scattered')['scores']['PQ']:.2f}" in out
    more = ["--model.backbone_init", "squares", "--schedule.max_steps", "1"]
    assert run_command(segment.main, [*config, *more]) == 0


def test_damaged_headers_are_one_line(shipped, tmp_path, capsys):
    weights = {"a": torch.zeros(1)}
    for number, header in enumerate(["{", "[" * 100000, "[]", '{"trained": {"kind": 1}}', '{"trained": {"model": 3}}']):
        path = tmp_path / f"{number}.safetensors"
        save_file(weights, path, {fast.pretrained.HEADER: header})
        picture = str(shipped / "squares_samples" / "p2.png")
        assert run_command(predict.main, [picture, "--checkpoint", str(path), "--out", str(tmp_path / "o")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and path.name in error


def test_export_refuses(exported, shipped, tmp_path, capsys):
    checkpoints = exported[0]

    def refused(message, name, *arguments, checkpoint=checkpoints["squares"]):
        assert export_stand_in(checkpoint, name, shipped, *arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1

    before = sorted(shipped.rglob("*"))
    refused("squares.safetensors exists: pass --replace", "squares")
    refused("lower-case letters", "Bad Name")
    refused("no validation picture p9; there are p1, p2", "new", "--samples", "p9")
    refused("no checkpoint", "new", checkpoint=tmp_path / "none.pt")
    refused("--samples of Scattered Digits is how many", "new", "--samples", "p1", checkpoint=checkpoints["digits"])
    state = torch.load(checkpoints["squares"], weights_only=True)
    state["model"]["decoder.class_head.weight"] *= 1e9
    torch.save(state, tmp_path / "large.pt")
    refused("pass --precision float32", "new", checkpoint=tmp_path / "large.pt")
    assert sorted(shipped.rglob("*")) == before


def test_export_measures_what_may_ship(exported, shipped, monkeypatch, capsys):
    monkeypatch.setattr(export, "MOST_SAMPLE_BYTES", 500)
    assert export_stand_in(exported[0]["squares"], "new", shipped, "--samples", "2") == 2
    assert "name fewer or smaller (p1 " in capsys.readouterr().err
    monkeypatch.setattr(export, "MOST_BYTES", 5000)
    assert export_stand_in(exported[0]["squares"], "new", shipped) == 2
    assert "more than 5,000" in capsys.readouterr().err


@pytest.mark.parametrize("text, message", [("limits: a", "title, summary"), ("- a", "title"), ("{", "cannot read")])
def test_a_card_without_its_texts_is_refused(tmp_path, text, message):
    (tmp_path / "about.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        export.read_about(tmp_path / "about.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "train" / "cards").glob("*.yaml")), ids=lambda path: path.stem)
def test_texts_of_the_cards(path):
    if export.UNWRITTEN in path.read_text():
        with pytest.raises(UserError, match="still to be written"):
            export.read_about(path)
    else:
        assert export.read_about(path)["limits"]


def test_a_grey_sample_comes_back_as_it_was(shipped, exported):
    original = exported[1].parent / "squares" / "val" / "p2.png"
    with Image.open(shipped / "squares_samples" / "p2.png") as found:
        assert found.mode == "L"
    pictures = [read_picture(path) for path in (original, shipped / "squares_samples" / "p2.png")]
    assert np.array_equal(*pictures)
