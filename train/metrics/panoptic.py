"""Panoptic quality (Kirillov et al., Panoptic Segmentation, 2019, section 4), counted as COCO counts it.

A predicted and a true segment of the same class match if their intersection over union exceeds 1/2; there can be only
one such pair for each. Void (true pixels without a segment) is taken out of the union. Crowds are matched with nothing
and missed by nobody; a prediction that lies by more than half in void and in crowds of its own class is not counted.
PQ = SQ x RQ, SQ = mean overlap of the matches, RQ = matches / (matches + half the unmatched).

Counted by hand, as panopticapi reads two folders of files, and torchmetrics' PanopticQuality
knows neither crowds nor void that is no class; ``tests/test_seg_eval_official.py`` compares with its count where its
rules apply.
"""

import numpy as np

from ..data.sample import Sample, Vocabulary
from ..inference.predictions import Panoptic
from .evaluator import Evaluator
from .semantic import mean
from .targets import segment_map


class PanopticEvaluator(Evaluator):
    """Evaluate panoptic results: PQ, SQ, RQ, each also as ``*_things`` and ``*_stuff``; PQ, SQ and RQ of each class.

    Parameters
    ----------
    vocabulary : Vocabulary

    Attributes
    ----------
    counts : ndarray of float64, shape (C, 4)
        Of each class: sum of the matches' overlaps, matches, predictions without a match, true segments without one.
    """

    task = "panoptic"

    def __init__(self, vocabulary: Vocabulary):
        super().__init__(vocabulary)
        self.counts = np.zeros((vocabulary.num_classes, 4))

    def compute(self) -> dict:
        """Scores in percent; classes that are neither in the target nor predicted take no part."""
        things = np.array([each.is_thing for each in self.vocabulary.classes])
        scores = qualities(self.counts)
        result = {}
        for suffix, part in (("", np.full_like(things, True)), ("_things", things), ("_stuff", ~things)):
            result |= {f"{name}{suffix}": mean(values[part]) for name, values in scores.items()}
        per_class = {
            each.name: {name: float(values[label]) for name, values in scores.items()}
            for label, each in enumerate(self.vocabulary.classes)
        }
        return result | {"per_class": per_class}

    def _add(self, target: Sample, prediction: Panoptic) -> None:
        self.counts += count(target, prediction, self.vocabulary.num_classes)

    def _kept(self) -> np.ndarray:
        return self.counts

    def _join(self, kept: np.ndarray) -> None:
        self.counts += kept


def qualities(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Turn counts (C, 4) into PQ, SQ and RQ of each class (C,), in percent; NaN for classes without segments."""
    overlap, matches = counts[:, 0], counts[:, 1]
    segments = matches + counts[:, 2:].sum(1) / 2
    with np.errstate(invalid="ignore"):
        recognition = 100 * matches / segments
        quality = 100 * overlap / segments
    segmentation = np.where(segments > 0, 100 * overlap / np.maximum(matches, 1), np.nan)
    return {"PQ": quality, "SQ": segmentation, "RQ": recognition}


def count(target: Sample, prediction: Panoptic, classes: int) -> np.ndarray:
    """Match the segments of one image.

    Parameters
    ----------
    target : Sample
    prediction : Panoptic
    classes : int
        Number C of classes.

    Returns
    -------
    ndarray of float64, shape (C, 4)
        As ``PanopticEvaluator.counts``.
    """
    pixels = shared_pixels(target, prediction)
    true_area, area, void = pixels.sum(1), pixels.sum(0), pixels[0]
    overlap = pixels / np.maximum(true_area[:, None] + area - pixels - void, 1)  # (1 + g, 1 + s)
    true_labels = np.r_[-1, target.labels]
    labels = np.r_[-2, [segment.label for segment in prediction.segments]].astype(np.int64)
    crowd = np.r_[False, target.crowd]
    same = true_labels[:, None] == labels
    matched = same & ~crowd[:, None] & (overlap > 0.5)
    excused = void + (pixels * (same & crowd[:, None])).sum(0)
    wrong = ~matched.any(0) & (excused <= area / 2) & (labels >= 0)
    missed = ~matched.any(1) & ~crowd & (true_area > 0) & (true_labels >= 0)
    rows, columns = matched.nonzero()
    result = np.zeros((classes, 4))
    np.add.at(result[:, 0], true_labels[rows], overlap[rows, columns])
    for column, found in enumerate((true_labels[rows], labels[wrong], true_labels[missed]), 1):
        result[:, column] = np.bincount(found, minlength=classes)
    return result


def shared_pixels(target: Sample, prediction: Panoptic) -> np.ndarray:
    """Count the pixels of each true (row) and each predicted (column) segment, (1 + g, 1 + s); 0 is none."""
    ids = np.array([0, *(segment.id for segment in prediction.segments)], dtype=np.int64)
    order = ids.argsort()
    columns = order[np.searchsorted(ids, prediction.map, sorter=order)]
    shape = len(target.masks) + 1, len(ids)
    return np.bincount(
        (segment_map(target) * np.int64(shape[1]) + columns).ravel(), minlength=shape[0] * shape[1]
    ).reshape(shape)
