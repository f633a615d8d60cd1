"""The evaluators of segmentation give 100 for the target, and for a known corruption the number worked out by hand."""

import numpy as np
import pytest

from tests.seg_eval_cases import CITY, TOY, box, city_ids, city_sample, instances, panoptic, sample
from train.metrics.cityscapes import CityscapesInstanceEvaluator, CityscapesPanopticEvaluator
from train.metrics.coco import InstanceEvaluator
from train.metrics.evaluator_list import create_evaluators
from train.metrics.panoptic import PanopticEvaluator
from train.metrics.semantic import SemanticEvaluator
from train.metrics.targets import label_map

FIRST, SECOND = box(2, 2, 10, 10), box(5, 16, 10, 10)
CARS = [CITY.label_of[26]] * 2


def evaluated(evaluator, *pairs):
    """Scores of these pairs of target and prediction."""
    for target, prediction in pairs:
        evaluator.update(target, prediction)
    return evaluator.compute()


def perfect(target, vocabulary):
    """The target as a prediction of every task."""
    real = ~target.crowd
    things = real & np.isin(target.labels, list(vocabulary.things))
    return {
        "semantic": np.maximum(label_map(target), 0),
        "instance": instances(target.masks[things], target.labels[things]),
        "panoptic": panoptic(target.masks[real], target.labels[real], vocabulary, target.ignore.shape),
    }


@pytest.mark.parametrize("vocabulary", [TOY, CITY], ids=["coco", "cityscapes"])
def test_truth_as_prediction_gives_100(vocabulary):
    evaluators = create_evaluators(vocabulary, ["semantic", "instance", "panoptic"])
    for seed in range(3):
        target = city_sample(city_ids(seed), f"image_{seed}", "panoptic")
        if vocabulary is TOY:  # road and sky to sky, persons to one, cars to two
            table = {CITY.label_of[number]: toy for number, toy in ((7, 2), (23, 2), (24, 0), (26, 1))}
            stuff = np.isin(target.labels, [CITY.label_of[7], CITY.label_of[23]])
            masks = [*target.masks[~stuff], target.masks[stuff].any(0)]
            labels = [*(table[label] for label in target.labels[~stuff].tolist()), 2]
            target = sample(
                masks, labels, target.name, [*target.crowd[~stuff], False], target.ignore, target.ignore.shape
            )
        evaluators.update(target, perfect(target, vocabulary))
    scores = evaluators.compute()
    for name in ("mIoU", "pixel_accuracy", "AP", "AP50", "PQ", "SQ", "RQ", "PQ_things", "PQ_stuff"):
        assert scores[name] == pytest.approx(100), name


def test_semantic_by_hand():
    """Target: 300 pixels of each of two classes; 60 of the second are taken for the first.

    IoU 300/360 and 240/300, mean (83.33 + 80) / 2; 540 of 600 pixels are right; the third class takes no part.
    """
    left = box(0, 0, 20, 15)
    prediction = np.where(box(0, 0, 20, 18), 0, 1)
    scores = evaluated(SemanticEvaluator(TOY), (sample([left, ~left], [0, 1]), prediction))
    assert scores["mIoU"] == pytest.approx(100 * (300 / 360 + 240 / 300) / 2)
    assert scores["pixel_accuracy"] == pytest.approx(90)
    assert scores["mean_accuracy"] == pytest.approx(100 * (1 + 0.8) / 2)
    assert np.isnan(scores["per_class"]["sky"]["IoU"])


def test_semantic_ignored_pixels_do_not_count():
    """As above with the 60 wrong pixels ignored: everything else is right."""
    left, wrong = box(0, 0, 20, 15), box(0, 15, 20, 3)
    prediction = np.where(box(0, 0, 20, 18), 0, 1)
    scores = evaluated(SemanticEvaluator(TOY), (sample([left, ~left], [0, 1], ignore=wrong), prediction))
    assert scores["mIoU"] == scores["pixel_accuracy"] == 100


def test_ap_of_a_dropped_object():
    """One of two objects: precision 1 up to recall 1/2, so at 51 of the 101 recalls 0, 0.01, ..., 1."""
    scores = evaluated(InstanceEvaluator(TOY), (sample([FIRST, SECOND], [0, 0]), instances([FIRST], [0])))
    assert scores["AP"] == scores["AP50"] == pytest.approx(100 * 51 / 101)
    assert scores["AR"] == pytest.approx(50)


def test_ap_of_a_shifted_mask():
    """10 x 10 shifted by 2: 80 / 120 = 0.667 passes the overlaps 0.5, 0.55, 0.6, 0.65: four of ten."""
    shifted = np.roll(FIRST, 2, axis=1)
    scores = evaluated(InstanceEvaluator(TOY), (sample([FIRST], [0]), instances([shifted], [0])))
    assert scores["AP"] == pytest.approx(40)
    assert (scores["AP50"], scores["AP75"]) == (pytest.approx(100), 0)


def test_ap_of_a_swapped_label():
    """The surer prediction has the wrong label: class one has precision 1/2 at every recall, class two nothing."""
    target = sample([FIRST, SECOND], [0, 1])
    scores = evaluated(InstanceEvaluator(TOY), (target, instances([SECOND, FIRST], [0, 0])))
    assert scores["per_class"]["one"]["AP"] == pytest.approx(50)
    assert scores["per_class"]["two"]["AP"] == 0
    assert scores["AP"] == pytest.approx(25)


def test_ap_by_area():
    """100 pixels are small below 150, 400 large above 300; only the small object is found."""
    large = box(0, 8, 20, 20)
    pair = sample([box(0, 0, 20, 5), large], [0, 0]), instances([box(0, 0, 20, 5)], [0])
    scores = evaluated(InstanceEvaluator(TOY, areas=(150, 300)), pair)
    assert (scores["AP_small"], scores["AP_large"]) == (pytest.approx(100), 0)
    assert np.isnan(scores["AP_medium"])
    by_coco = evaluated(InstanceEvaluator(TOY), pair)  # both are small to COCO
    assert by_coco["AP_small"] == pytest.approx(100 * 51 / 101)


def test_ap_in_crowds_and_ignored_pixels():
    """A surer prediction inside a crowd, and one on ignored pixels, are not held against the right one."""
    nowhere = box(16, 0, 4, 4)
    target = sample([FIRST, SECOND], [0, 0], crowd=[False, True], ignore=nowhere)
    prediction = instances([box(6, 17, 5, 5), nowhere, FIRST], [0, 0, 0])
    assert evaluated(InstanceEvaluator(TOY), (target, prediction))["AP"] == pytest.approx(100)
    without = sample([FIRST], [0])  # both wrong ones are surer: precision 1/3 at every recall
    assert evaluated(InstanceEvaluator(TOY), (without, prediction))["AP"] == pytest.approx(100 / 3)


def measured(target, prediction, least_score=0.5):
    return evaluated(InstanceEvaluator(TOY, least_score=least_score), (target, prediction))["mean_precision"]


def test_mean_precision_of_a_dropped_an_added_and_a_shifted_object():
    """Target: two squares of 100 pixels. Alone, one of them: 1 of 2 at every overlap.

    Shifted by 2 the overlap is 80 / 120 = 0.667: found at 0.50, 0.55, 0.60, 0.65, so that of two objects and two
    predictions 2 / 2 are right at four thresholds and 1 / 3 at six; with a third object on nothing, 2 / 3 and 1 / 4.
    """
    target, moved, other = sample([FIRST, SECOND], [0, 0]), box(4, 2, 10, 10), box(16, 2, 4, 10)
    assert measured(target, instances([FIRST], [0])) == pytest.approx(50)
    assert measured(target, instances([moved, SECOND], [0, 0])) == pytest.approx(100 * (4 * 1 + 6 / 3) / 10)
    assert measured(target, instances([moved, SECOND, other], [0] * 3)) == pytest.approx(100 * (4 * 2 / 3 + 6 / 4) / 10)
    assert measured(target, instances([FIRST, SECOND, other], [0] * 3, [0.9, 0.8, 0.4])) == pytest.approx(100)
    assert "mean_precision" not in evaluated(InstanceEvaluator(TOY), (target, instances([FIRST], [0])))


def test_mean_precision_counts_overlaps_above_the_threshold_only():
    """An overlap of 50 / 100 is none at 0.50, and one of 51 / 100 at 0.50 alone."""
    whole, half = box(0, 0, 10, 10), box(0, 0, 5, 10)
    more = half.copy()
    more[5, 0] = True
    assert measured(sample([whole], [0]), instances([half], [0])) == 0
    assert measured(sample([whole], [0]), instances([more], [0])) == pytest.approx(10)


def test_mean_precision_shares_no_pixel_and_is_averaged_over_pictures():
    """A copy of a surer object has no pixels left; what is ignored or in a crowd does not count."""
    target = sample([FIRST, SECOND, box(0, 28, 20, 2)], [0, 1, 0], crowd=[False, False, True], ignore=box(18, 0, 2, 20))
    exact, extra = [SECOND, FIRST, FIRST], [box(0, 28, 9, 2), box(18, 0, 1, 9)]
    assert measured(target, instances([*exact, *extra], [1, 0, 0, 0, 0], [0.9] * 5)) == pytest.approx(100)
    assert measured(target, instances([FIRST, SECOND], [0, 0])) == pytest.approx(100 / 3), "a wrong label"
    empty = sample([], [], "nothing")
    assert measured(empty, []) == 100 and measured(empty, instances([FIRST], [0])) == 0
    pairs = [(target, instances(exact, [1, 0, 0])), (empty, instances([FIRST], [0]))]
    assert evaluated(InstanceEvaluator(TOY, least_score=0.5), *pairs)["mean_precision"] == pytest.approx(50)


def test_cityscapes_ap_of_a_dropped_object():
    """Two objects of 100 pixels, one found: precision 1 over half of the recall."""
    pair = sample([FIRST, SECOND], CARS), instances([FIRST], CARS[:1])
    scores = evaluated(CityscapesInstanceEvaluator(CITY), pair)
    assert scores["AP"] == scores["AP50"] == pytest.approx(50)
    assert scores["per_class"]["car"]["AP"] == pytest.approx(50)


def test_cityscapes_ap_of_a_shifted_mask():
    """0.667 passes four of ten overlaps, as with COCO."""
    pair = sample([FIRST], CARS[:1]), instances([np.roll(FIRST, 2, axis=1)], CARS[:1])
    scores = evaluated(CityscapesInstanceEvaluator(CITY), pair)
    assert scores["AP"] == pytest.approx(40)
    assert scores["AP50"] == pytest.approx(100)


@pytest.mark.parametrize("evaluator", [PanopticEvaluator, CityscapesPanopticEvaluator])
def test_pq_of_a_dropped_object(evaluator):
    """Class one: 1 match, 1 miss: SQ 1, RQ 1 / 1.5. Sky, 400 pixels, is whole: PQ 1. Mean (2/3 + 1) / 2."""
    masks, labels = [FIRST, SECOND, ~(FIRST | SECOND)], [0, 0, 2]
    pair = sample(masks, labels), panoptic([masks[0], masks[2]], [0, 2])
    scores = evaluated(evaluator(TOY), pair)
    assert scores["PQ_things"] == scores["RQ_things"] == pytest.approx(200 / 3)
    assert scores["PQ_stuff"] == scores["SQ"] == pytest.approx(100)
    assert scores["PQ"] == pytest.approx(100 * (2 / 3 + 1) / 2)


@pytest.mark.parametrize("evaluator", [PanopticEvaluator, CityscapesPanopticEvaluator])
def test_pq_of_a_shifted_mask(evaluator):
    """One object of 100 pixels shifted by 2: 80 / 120; sky keeps 480 of 500 and gains 20: 480 / 520."""
    shifted = np.roll(FIRST, 2, axis=1)
    scores = evaluated(evaluator(TOY), (sample([FIRST, ~FIRST], [0, 2]), panoptic([shifted, ~shifted], [0, 2])))
    assert scores["PQ_things"] == scores["SQ_things"] == pytest.approx(100 * 80 / 120)
    assert scores["PQ_stuff"] == pytest.approx(100 * 480 / 520)
    assert scores["RQ"] == 100


@pytest.mark.parametrize("evaluator", [PanopticEvaluator, CityscapesPanopticEvaluator])
def test_pq_of_a_swapped_label(evaluator):
    """The second of two objects gets class two: class one 1 match, 1 miss (PQ 2/3); class two a false one (PQ 0)."""
    masks = [FIRST, SECOND]
    scores = evaluated(evaluator(TOY), (sample(masks, [0, 0]), panoptic(masks, [0, 1])))
    assert scores["per_class"]["one"]["PQ"] == pytest.approx(200 / 3)
    assert scores["per_class"]["two"]["PQ"] == scores["per_class"]["two"]["SQ"] == 0
    assert scores["PQ"] == pytest.approx(100 / 3)


@pytest.mark.parametrize("evaluator", [PanopticEvaluator, CityscapesPanopticEvaluator])
def test_pq_in_crowds_and_void(evaluator):
    """Segments in a crowd of their class or in void do not count; one in a crowd of another class is a false one.

    Class one: 1 match, nothing else. Class two: no target, 1 false one: PQ 0. Mean 50.
    """
    nowhere, crowd = box(16, 0, 4, 4), box(5, 16, 10, 14)
    target = sample([FIRST, crowd], [0, 0], crowd=[False, True], ignore=nowhere)
    prediction = panoptic([FIRST, box(5, 16, 5, 5), nowhere, box(10, 16, 5, 5)], [0, 0, 1, 1])
    scores = evaluated(evaluator(TOY), (target, prediction))
    assert scores["per_class"]["one"]["PQ"] == 100
    assert scores["PQ"] == scores["PQ_things"] == 50
    assert np.isnan(scores["PQ_stuff"])
