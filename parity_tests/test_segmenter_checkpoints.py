"""Checkpoints of segmenters: official names and shapes key by key, strictness, and detectron2's pickles, never run."""

import json
import os
import pickle
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

import fast
from fast import checkpoints
from fast.checkpoints import CheckpointError, from_official, to_official
from parity_tests.heads import SMALL_HEAD, pictures, segmenter
from parity_tests.weights import fill

OFFICIAL = json.loads((Path(__file__).parent / "golden" / "official_state_dicts.json").read_text())[
    "segmentation/mini_ade20k"
]


@lru_cache(maxsize=2)
def meta_segmenter():
    with torch.device("meta"):
        return fast.create_segmenter("aff_mini")


def shapes(state_dict):
    return {name: list(value.shape) for name, value in state_dict.items()}


def test_official_keys_and_shapes_both_ways():
    ours = meta_segmenter().state_dict()
    assert shapes(to_official(ours)) == OFFICIAL
    given = {name: torch.empty(shape, device="meta") for name, shape in OFFICIAL.items()}
    translated = from_official({"model": given, "iteration": 3})
    assert shapes(translated) == shapes(ours) and list(from_official(to_official(ours))) == list(ours)
    for name, value in given.items():
        assert translated[checkpoints.our_name(name)] is value
        assert checkpoints.official_name(checkpoints.our_name(name)) == name


def nano_official():
    """A nano Mask2Former and its weights under the official names."""
    model = fast.create_segmenter("aff_nano", **{**SMALL_HEAD, "points": 4})
    fill(model)
    return model, to_official(model.state_dict())


def test_missing_unknown_and_misshapen_keys_are_all_listed():
    _, official = nano_official()
    pixels, queries = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
    missing = ["backbone.norm2.bias", f"{pixels}layer_1.0.linear.weight", f"{queries}class_embed.bias"]
    for name in missing:
        del official[name]
    wrong = [f"{pixels}transformer.encoder.layers.1.self_attn.shepard_power", f"{queries}mask_embed.layers.2.weight"]
    official |= dict.fromkeys(wrong, torch.zeros(3)) | {
        f"{queries}surprise": torch.zeros(1),
        "sem_seg_head.x": torch.zeros(2),
    }
    with pytest.raises(CheckpointError) as error:
        from_official(official)
    message = str(error.value)
    assert all(name in message for name in (*missing, *wrong, f"{queries}surprise", "sem_seg_head.x"))
    assert all(f"{kind}: " in message for kind in ("missing", "unknown", "misshapen")) and "\n" not in message


def test_weights_of_another_head_are_refused():
    model, _ = segmenter("hcformer")
    with pytest.raises(CheckpointError, match="not the weights of a Mask2Former"):
        to_official(model.state_dict())
    with pytest.raises(RuntimeError, match="Missing key.*pixel_decoder"):
        segmenter("mask2former")[0].load_state_dict(model.state_dict())


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_a_pickle_of_arrays_is_read_as_tensors(tmp_path, protocol):
    """As detectron2 writes its ``.pkl``; a file of torch.save under that name is read, too."""
    model, official = nano_official()
    path = tmp_path / "model.pkl"
    content = {
        "model": {k: v.numpy() for k, v in official.items()},
        "__author__": "someone",
        "matching_heuristics": True,
    }
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    other = fast.create_segmenter("aff_nano", **{**SMALL_HEAD, "points": 4}).eval()
    loaded = checkpoints.load(path)
    other.load_state_dict(from_official(loaded))
    images = torch.from_numpy(pictures(32, 40)).float()
    with torch.no_grad():
        assert torch.equal(other(images).masks_queries_logits, model.eval()(images).masks_queries_logits)
    assert loaded["matching_heuristics"] is True and loaded["__author__"] == "someone"
    torch.save({"model": official}, path)
    assert from_official(checkpoints.load(path)).keys() == model.state_dict().keys()


class Intruder:
    """Unpickled, it would run a command that leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"model": {"weight": np.zeros(3)}, "more": Intruder(marker)}))
    with pytest.raises(CheckpointError, match=r"was refused: reading it would run \w+\.system"):
        checkpoints.load(path)
    assert not marker.exists()


def test_a_broken_pickle_is_named(tmp_path):
    path, whole = tmp_path / "model.pkl", pickle.dumps({"model": {"weight": np.arange(999.0)}})
    for content in (b"", whole[:-20], whole[5:], os.urandom(0) + bytes(range(200)), pickle.dumps([1, 2])):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="model.pkl (is truncated or corrupted|holds a list)"):
            checkpoints.load(path)
