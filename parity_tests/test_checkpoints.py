"""Checkpoints: official names and shapes key by key, strictness, and files that would run code."""

import json
import os
import pickle
import sys
import types
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

import fast
from fast import checkpoints
from fast.checkpoints import CheckpointError, config_from, from_official, load, to_official

OFFICIAL = json.loads((Path(__file__).parent / "golden" / "official_state_dicts.json").read_text())
PARAMETERS = {"mini": 6_754_451, "tiny": 27_020_367, "small": 42_612_961, "base": 75_341_075}  # Table 1


@lru_cache(maxsize=8)
def meta_model(name, **options):
    """A model without numbers: names and shapes alone."""
    with torch.device("meta"):
        return fast.create_model(name, **options)


def shapes(state_dict):
    return {name: list(value.shape) for name, value in state_dict.items()}


def nano_official():
    """A nano model and its state dict under the official names."""
    model = fast.create_model("aff_nano", num_classes=4)
    return model, to_official(model.state_dict())


@pytest.mark.parametrize("variant", PARAMETERS)
def test_number_of_parameters(variant):
    assert sum(p.numel() for p in meta_model(f"aff_{variant}").parameters()) == PARAMETERS[variant]


@pytest.mark.parametrize("variant", PARAMETERS)
def test_official_keys_and_shapes_both_ways(variant):
    official, ours = OFFICIAL[f"classification/{variant}"], meta_model(f"aff_{variant}").state_dict()
    assert shapes(to_official(ours)) == official
    given = {name: torch.empty(shape, device="meta") for name, shape in official.items()}
    translated = from_official(given)
    assert shapes(translated) == shapes(ours)
    for name, value in given.items():
        assert translated[checkpoints.our_name(name)] is value
        assert checkpoints.official_name(checkpoints.our_name(name)) == name


def test_official_backbone_of_a_segmenter():
    start = "backbone."
    keys = OFFICIAL["segmentation/mini_ade20k"]
    official = {name[len(start) :]: shape for name, shape in keys.items() if name.startswith(start)}
    ours = meta_model("aff_mini", features_only=True).state_dict()
    assert shapes(to_official(ours)) == official
    given = {name: torch.empty(shape, device="meta") for name, shape in official.items()}
    assert shapes(from_official(given)) == shapes(ours)


def test_round_trip_is_the_identity():
    model, official = nano_official()
    again = from_official(official)
    assert list(again) == list(model.state_dict())
    assert all(again[name] is official[checkpoints.official_name(name)] for name in again)
    other = fast.create_model("aff_nano", num_classes=4)
    other.load_state_dict(again)
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.eval()(images), other.eval()(images))


def test_whole_content_of_a_file_will_do():
    _, official = nano_official()
    content = {"model": official, "epoch": 3, "config": {}}
    assert from_official(content).keys() == from_official(official).keys()


def test_missing_unknown_and_misshapen_keys_are_all_listed():
    _, official = nano_official()
    missing = ["norm.bias", "layers.0.blocks.0.attn.q.weight", "layers.1.downsample.linear.weight"]
    for name in missing:
        del official[name]
    official |= {"layers.0.surprise": torch.zeros(1), "head.scale": torch.zeros(2)}
    official["layers.2.blocks.1.attn.blank_k"] = torch.zeros(5)
    official["patch_embed.proj1.bias"] = torch.zeros(9)
    with pytest.raises(CheckpointError) as error:
        from_official(official)
    message = str(error.value)
    for name in (
        *missing,
        "layers.0.surprise",
        "head.scale",
        "layers.2.blocks.1.attn.blank_k",
        "patch_embed.proj1.bias",
    ):
        assert name in message
    assert all(f"{kind}: " in message for kind in ("missing", "unknown", "misshapen"))
    assert "(5,), not (48,)" in message and "\n" not in message


def test_two_names_for_one_weight_and_values_that_are_none_are_listed():
    _, official = nano_official()
    doubled = checkpoints.our_name("layers.0.blocks.0.attn.q.weight")
    official |= {doubled: torch.zeros(16, 16), "epoch": 3}
    with pytest.raises(CheckpointError, match=f"unknown: epoch, {doubled}$"):
        from_official(official)


@pytest.mark.parametrize(
    "content", [{}, {"weight": torch.zeros(3)}, {"layers.0.blocks.0.norm1.weight": torch.zeros(8)}], ids=str
)
def test_weights_of_something_else_are_refused(content):
    with pytest.raises(CheckpointError, match="not the weights of an AutoFocusFormer"):
        from_official(content)


@pytest.mark.parametrize("name", ["aff_nano", "aff_mini", "aff_tiny", "aff_small", "aff_base"])
def test_config_is_read_off_the_shapes(name):
    model = meta_model(name)
    config, features_only = config_from(model.state_dict())
    assert not features_only
    for field in ("num_classes", "depths", "dims", "heads", "mlp_ratio"):
        assert getattr(config, field) == getattr(model.config, field)
    assert (config.layer_scale is None) == (model.config.layer_scale is None)


class Malice:
    """Pickles to a call of ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def attacks(marker):
    return {
        "os_system": Malice(os.system, f"touch {marker}"),
        "eval": Malice(eval, f"open({str(marker)!r}, 'w').close()"),
        "open": Malice(open, str(marker), "w"),
        "path_touch": Malice(Path.touch, marker),
        "torch_load": Malice(torch.load, str(marker)),
        "numpy_save": Malice(np.save, str(marker), np.zeros(1)),
    }


@pytest.mark.parametrize("form", ["pickle", "torch_zip", "torch_old"])
@pytest.mark.parametrize("attack", list(attacks(Path("x"))))
def test_a_file_that_would_run_code_is_refused_and_nothing_happens(attack, form, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "weights.pth"
    content = {"model": {"norm.weight": torch.zeros(2)}, "extra": attacks(marker)[attack]}
    if form == "pickle":
        path.write_bytes(pickle.dumps({"extra": content["extra"]}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch_zip")
    with pytest.raises(CheckpointError) as error:
        load(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["weights.pth"]
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert "was refused: reading it would run " in str(error.value) and "GLOBAL" not in str(error.value)


def saved(path, zipped=True):
    torch.save({"model": {"norm.weight": torch.arange(64.0)}}, path, _use_new_zipfile_serialization=zipped)
    return path.read_bytes()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("share", [0, 0.02, 0.3, 0.6, 0.95])
def test_truncated_files_are_refused(share, zipped, tmp_path):
    path = tmp_path / "weights.pth"
    whole = saved(path, zipped)
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match="weights.pth .*(truncated|corrupted|refused)"):
        load(path)


@pytest.mark.parametrize(
    "content", [b"garbage" * 50, b"PK\x03\x04" + b"\0" * 90, b"\x80\x02" + b"\xff" * 30, b"<html>404</html>"]
)
def test_garbage_is_refused(content, tmp_path):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="weights.pth"):
        load(tmp_path / "weights.pth")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_flipped_bytes_are_refused_or_harmless(zipped, tmp_path):
    """A flip in a tensor's own bytes may change a number; any other is refused by name, never another exception."""
    path = tmp_path / "weights.pth"
    whole, rng, refused = saved(path, zipped), np.random.default_rng(0), 0
    for _ in range(400):
        place, value = rng.integers(0, len(whole)), int(rng.integers(0, 256))
        path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
        try:
            assert isinstance(load(path), dict)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 100


def test_other_pickle_protocols_are_refused_too(tmp_path):
    (tmp_path / "weights.pth").write_bytes(pickle.dumps({"extra": Malice(os.system, f"touch {tmp_path}/marker")}))
    with pytest.raises(CheckpointError):
        load(tmp_path / "weights.pth")
    assert not (tmp_path / "marker").exists()


def test_a_file_that_holds_no_dict_is_refused(tmp_path):
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="list.pth holds a list, not a dict"):
        load(tmp_path / "list.pth")


def test_no_such_file(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match="no checkpoint at"):
            load(path)


def config_node(monkeypatch):
    """A stand-in for yacs: a dict subclass that pickles by its class's name."""
    package, module = types.ModuleType("yacs"), types.ModuleType("yacs.config")
    node = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    package.config, module.CfgNode = module, node
    monkeypatch.setitem(sys.modules, "yacs", package)
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    return node


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_official_extras_load_as_plain_values(zipped, tmp_path, monkeypatch):
    node, path = config_node(monkeypatch), tmp_path / "official.pth"
    inner = node({"TYPE": "aff", "DEPTHS": [2, 2, 6, 2]})
    config = node({"MODEL": inner, "AMP": True})
    config.__dict__ |= {"__immutable__": True, "__deprecated_keys__": set(), "__renamed_keys__": {}}
    content = {"model": {"norm.weight": torch.ones(3)}, "config": config}
    content |= {"max_accuracy": np.float64(78.2), "epoch": np.int64(299), "table": np.arange(6).reshape(2, 3)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    for name in ("yacs", "yacs.config"):
        monkeypatch.delitem(sys.modules, name)
    got = load(path)
    assert got["max_accuracy"] == 78.2 and got["epoch"] == 299 and got["table"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert got["config"]["MODEL"]["DEPTHS"] == [2, 2, 6, 2] and isinstance(got["config"], dict)
    assert torch.equal(got["model"]["norm.weight"], torch.ones(3))


def test_file_of_an_official_network_loads_into_the_model(tmp_path):
    model, official = nano_official()
    torch.save({"model": official}, tmp_path / "nano.pth")
    other = fast.create_model("aff_nano", num_classes=model.num_classes)
    other.load_state_dict(from_official(load(tmp_path / "nano.pth")))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path, (_, official) = tmp_path / "nano.safetensors", nano_official()
    safetensors.save_file(official, path)
    assert all(torch.equal(value, official[name]) for name, value in load(path).items())
    whole = path.read_bytes()
    for share in (0, 0.001, 0.5, 0.99):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(CheckpointError, match="truncated or corrupted"):
            load(path)


def test_safetensors_missing_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.safetensors").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        load(tmp_path / "a.safetensors")
