"""60,000 classes, and checkpoints of 1,000 processes: one's own files can be read again, in bounded time."""

import pickletools
import time
import zipfile

import numpy as np
import pytest
import torch

from fast.checkpoints import load
from fast.plain_pickle import MOST_INSTRUCTIONS
from train.common.errors import UserError
from train.data.masks import encode
from train.data.sample import ClassInfo, Sample, Vocabulary
from train.data.segmentation import pack_vocabulary, unpack_vocabulary
from train.engine.state import random_states, set_random_states
from train.inference.predictions import Instance
from train.metrics.coco import InstanceEvaluator
from train.models.checkpoint import SEGMENTER, read_file, write_file
from train.models.weights import other_classes, places_of

MANY = 60_000
VOCABULARY = Vocabulary(tuple(ClassInfo(f"class {i}", i, i % 2 == 0, (1, 2, 3)) for i in range(MANY)), "many")


def test_a_checkpoint_of_many_classes_is_read_again(tmp_path):
    many = Vocabulary(VOCABULARY.classes[: MANY // 2], "many")  # a pickle of half of them was already too long
    names = ["a\udc80", *(each.name for each in many.classes[1:])]
    state = {"kind": SEGMENTER, "vocabulary": pack_vocabulary(many), "classes": names}
    write_file(tmp_path / "last.pt", state)
    assert isinstance(state["classes"], list)
    again = read_file(tmp_path / "last.pt", SEGMENTER, ("vocabulary", "classes"))
    assert unpack_vocabulary(again["vocabulary"]) == many and again["classes"] == names


def test_generators_go_on_from_states_of_either_form(tmp_path):
    torch.save(random_states(), tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as file:  # of 1,000 processes together at most half of what is read
        assert len(list(pickletools.genops(file.read("a/data.pkl")))) < MOST_INSTRUCTIONS / 2000
    state = load(tmp_path / "a.pt")
    version, inner, last = state["python"]
    wanted = torch.rand(3), np.random.random(3)
    for python in ((version, inner, last), (version, tuple(inner.tolist()), last)):  # the second: before
        set_random_states(state | {"python": python})
        assert torch.equal(torch.rand(3), wanted[0]) and (np.random.random(3) == wanted[1]).all()


@pytest.mark.parametrize("text", ["[", "[" * 100_000, "7", '{"a": 1}', '["a", 1]'])
def test_classes_that_are_no_list_are_named(tmp_path, text):
    torch.save({"kind": SEGMENTER, "classes": text}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="damaged: its 'classes' is not names of classes"):
        read_file(tmp_path / "a.pt", SEGMENTER)
    assert load(tmp_path / "a.pt")["classes"] == text


def test_many_classes_are_compared_at_once():
    names, start = [each.name for each in VOCABULARY.classes], time.process_time()
    assert places_of(names[::-1], names) == list(range(MANY))[::-1]
    assert "'class 59999' there, 'other' here" in str(other_classes("a.pt", names, [*names[:-1], "other"], "x"))
    assert time.process_time() - start < 1


def test_classes_without_objects_change_no_score_and_take_no_memory():
    masks = np.zeros((3, 20, 20), bool)
    masks[0, :8, :8], masks[1, 10:, 10:], masks[2, 2:6, 12:18] = True, True, True
    ignore, scores = np.zeros((20, 20), bool), []
    for count in (6, MANY):
        few = Vocabulary(VOCABULARY.classes[:count], "few")
        evaluator = InstanceEvaluator(few)
        sample = Sample(ignore, masks, np.array([0, 2, 2]), np.array([False, False, True]), ignore, "a")
        found = [
            Instance(label, score, encode(masks[i])) for i, label, score in ((0, 0, 0.9), (2, 2, 0.8), (1, 4, 1.0))
        ]
        evaluator.update(sample, found)
        values = evaluator.compute()
        assert len(values["per_class"]) == len(few.things)
        scores.append({name: value for name, value in values.items() if name != "per_class"})
        assert values["per_class"]["class 0"]["AP"] > 99.9 and np.isnan(values["per_class"]["class 4"]["AP"])
    assert repr(scores[0]) == repr(scores[1]) and 49.9 < scores[0]["AP"] < 50.1
