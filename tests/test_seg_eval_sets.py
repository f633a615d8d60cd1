"""Evaluating whole data sets: several processes, memory, nothing to evaluate, bad input."""

import pickle

import numpy as np
import pytest

from tests.seg_eval_cases import CITY, TOY, box, city_ids, city_sample, instances, panoptic, sample, shaken
from train.data.masks import decode, encode
from train.data.sample import ClassInfo, Vocabulary
from train.inference.predictions import Instance
from train.metrics.coco import InstanceEvaluator
from train.metrics.evaluator_list import create_evaluators
from train.metrics.submission import create_writer

TASKS = ("semantic", "instance", "panoptic")


class TwoRanks:
    """The first of two processes, as train.distributed.Ranks; the second has the state of ``other``."""

    rank, size, first = 0, 2, True

    def __init__(self, other):
        self.other = other

    def gather(self, value):
        return [value, pickle.loads(pickle.dumps(self.other.state()))]


def shaken_pair(seed, size=(60, 80)):
    """A target and predictions of all tasks that are partly right."""
    target = city_sample(city_ids(seed, size), f"image_{seed}", "panoptic")
    masks, labels = shaken(target, seed)
    things = [k for k, label in enumerate(labels) if label in CITY.things]
    found = panoptic(masks, labels, CITY, size)
    semantic = np.array([0, *labels])[found.map]
    objects = instances([masks[k] for k in things], [labels[k] for k in things])
    return target, {"semantic": semantic, "instance": objects, "panoptic": found}


@pytest.mark.parametrize("name", ["cityscapes", "coco-panoptic"])
@pytest.mark.parametrize("task", TASKS)
def test_two_ranks_equal_one(task, name):
    vocabulary = Vocabulary(CITY.classes, name)
    alone, first, second = (create_evaluators(vocabulary, [task]).evaluators[task] for _ in range(3))
    for seed in range(5):
        target, found = shaken_pair(seed)
        alone.update(target, found[task])
        (first, second)[seed % 2].update(target, found[task])
    first.gather(TwoRanks(second))
    np.testing.assert_equal(_rounded(first.compute()), _rounded(alone.compute()))


def _rounded(scores):
    """Scores to 9 digits: sums of overlaps depend on the order in the last."""
    return {key: _rounded(value) if isinstance(value, dict) else round(value, 9) for key, value in scores.items()}


def test_all_evaluators_at_once_have_stable_names():
    evaluators = create_evaluators(TOY, TASKS, areas=(50, 200))
    evaluators.update(sample([box(1, 1, 9, 9)], [0]), dict(_perfect()))
    scores = evaluators.compute()
    parts = [name + suffix for name in ("PQ", "SQ", "RQ") for suffix in ("", "_things", "_stuff")]
    recalls = ["AR", "AR_small", "AR_medium", "AR_large"]
    averages = ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"]
    assert set(scores) == {"mIoU", "mean_accuracy", "pixel_accuracy", *averages, *recalls, *parts, "per_class"}
    assert set(scores["per_class"]["one"]) == {"IoU", "AP", "AP50", "PQ", "SQ", "RQ"}
    assert scores["AP_medium"] == pytest.approx(100)
    assert all(isinstance(value, float) for key, value in scores.items() if key != "per_class")


def _perfect():
    yield "semantic", np.zeros((20, 30), dtype=np.int64)
    yield "instance", instances([box(1, 1, 9, 9)], [0])
    yield "panoptic", panoptic([box(1, 1, 9, 9)], [0])


@pytest.mark.parametrize("name", ["cityscapes", "coco-panoptic"])
def test_what_is_kept_is_small(name):
    """Sums do not grow; run lengths take less than a hundredth of the dense masks."""
    evaluators, dense = create_evaluators(Vocabulary(CITY.classes, name), TASKS), 0
    for seed in range(6):
        target, found = shaken_pair(seed, (300, 400))
        evaluators.update(target, found)
        dense += target.masks.size + len(found["instance"]) * target.ignore.size
    sizes = {task: len(pickle.dumps(evaluator.state())) for task, evaluator in evaluators.evaluators.items()}
    assert sizes["instance"] < dense / 100
    assert sizes["semantic"] < 19 * 19 * 8 + 1000
    assert sizes["panoptic"] < 19 * 4 * 8 + 1000


@pytest.mark.parametrize("vocabulary", [TOY, CITY], ids=["coco", "cityscapes"])
def test_empty_predictions_score_zero(vocabulary):
    evaluators = create_evaluators(vocabulary, ["instance", "panoptic"])
    label = min(vocabulary.things)
    evaluators.update(sample([box(0, 0, 12, 12)], [label]), {"instance": [], "panoptic": panoptic([], [])})
    scores = evaluators.compute()
    assert scores["AP"] == scores["PQ"] == scores["RQ"] == scores["PQ_things"] == 0


@pytest.mark.parametrize("vocabulary", [TOY, CITY], ids=["coco", "cityscapes"])
@pytest.mark.parametrize("kind", ["no image", "no objects", "all ignored"])
def test_nothing_to_evaluate_is_nan(vocabulary, kind):
    evaluators = create_evaluators(vocabulary, TASKS)
    label, mask = min(vocabulary.things), box(2, 2, 15, 15)
    nothing = {"semantic": np.zeros((20, 30), dtype=np.int64), "instance": [], "panoptic": panoptic([], [])}
    found = {**nothing, "instance": instances([mask], [label]), "panoptic": panoptic([mask], [label], vocabulary)}
    if kind == "no objects":
        evaluators.update(sample([], []), nothing)
    if kind == "all ignored":
        evaluators.update(sample([mask], [label], ignore=np.ones((20, 30), dtype=bool)), found)
    scores = evaluators.compute()
    assert all(np.isnan(scores[name]) for name in ("mIoU", "pixel_accuracy", "AP", "AP50", "PQ", "SQ", "RQ"))


@pytest.mark.parametrize("vocabulary", [TOY, CITY], ids=["coco", "cityscapes"])
def test_an_image_without_objects_beside_one_with(vocabulary):
    """A wrong prediction on the empty image, surer than the right one on the other; PQ 1 / 1.5.

    COCO: precision 1/2 at every recall, as the best at that recall or a higher one. Cityscapes goes along the curve
    (recall 0, precision 0) to (1, 1/2) in two half steps: 1/2 x 0 + 1/2 x 1/2.
    """
    evaluators, mask = create_evaluators(vocabulary, ["instance", "panoptic"]), box(2, 2, 15, 15)
    label = min(vocabulary.things)
    for name, masks, score in (("empty", [], 0.9), ("full", [mask], 0.5)):
        found = {"instance": instances([mask], [label], [score]), "panoptic": panoptic([mask], [label], vocabulary)}
        target = sample(masks, [label] * len(masks), name)
        if name == "empty":  # the background is known not to be an object
            stuff = next(k for k, each in enumerate(vocabulary.classes) if not each.is_thing)
            target = sample([np.ones((20, 30))], [stuff], name)
        evaluators.update(target, found)
    scores = evaluators.compute()
    assert scores["AP"] == pytest.approx(50 if vocabulary is TOY else 25)
    assert scores["PQ_things"] == pytest.approx(200 / 3)


BAD = {
    "size": ("semantic", np.zeros((30, 20), dtype=np.int64), "30 x 20 pixels for an image of 20 x 30"),
    "label": ("semantic", np.full((20, 30), 3), "label 3 is outside 0 to 2"),
    "mask size": ("instance", [Instance(0, 0.5, encode(np.ones((4, 5), dtype=bool)))], "4 x 5 pixels"),
    "instance label": ("instance", instances([box(0, 0, 2, 2)], [-1]), "label -1 is outside"),
    "score": ("instance", instances([box(0, 0, 2, 2)], [0], [float("nan")]), "score is nan"),
    "segments": ("panoptic", panoptic([box(0, 0, 2, 2)], []), r"differ in \[1\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_unfit_predictions_are_named(case):
    task, prediction, message = BAD[case]
    evaluator = create_evaluators(TOY, [task]).evaluators[task]
    with pytest.raises(ValueError, match=f"image a: .*{message}") as error:
        evaluator.update(sample([], []), prediction)
    assert "\n" not in str(error.value)
    assert not evaluator.names


def test_bad_choices_are_named():
    stuff = Vocabulary((ClassInfo("sky", 1, False, None),), "skies")
    wide = Vocabulary((ClassInfo("sky", 300, False, None),), "skies")
    evaluator = create_evaluators(TOY, ["instance"])
    evaluator.update(sample([], []), {"instance": []})
    for call, message in [
        (lambda: evaluator.update(sample([], []), {"instance": []}), "image a was evaluated twice"),
        (lambda: create_evaluators(TOY, ["depth"]), "unknown task 'depth'"),
        (lambda: create_writer("depth", ".", TOY), "unknown task 'depth'"),
        (lambda: InstanceEvaluator(TOY, (9, 9)), "two growing numbers"),
        (lambda: InstanceEvaluator(stuff), "no countable classes"),
        (lambda: create_writer("semantic", ".", wide), "do not fit into 8-bit"),
        (
            lambda: create_evaluators(Vocabulary(TOY.classes, "cityscapes"), ["instance"]),
            "'one' is none of Cityscapes'",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_run_lengths_round_trip():
    mask = box(3, 4, 5, 6)
    rle = encode(mask)
    np.testing.assert_array_equal(decode(rle), mask)
    np.testing.assert_array_equal(decode({**rle, "counts": rle["counts"].encode()}), mask)
