"""Mean precision of the objects of one picture: the measure of the 2018 Data Science Bowl (BBBC038).

    mean over t of TP(t) / (TP(t) + FP(t) + FN(t)),   t = 0.50, 0.55, ... 0.95

A predicted object is a true positive at t if its overlap (intersection over union) with a true object of its class is
greater than t. The score of a data set is the mean over its pictures. Unlike AP it needs a decision which objects are
found: those whose score reaches a given least one.
"""

import numpy as np

from ..data.masks import decode
from ..data.sample import Sample
from ..inference.predictions import Instance

OVERLAPS = np.arange(50, 100, 5) / 100


def measure_precision(target: Sample, prediction: list[Instance], least_score: float, things: set[int]) -> float:
    """Compute one picture's mean precision.

    Parameters
    ----------
    target : Sample
        Pixels that are ignored or in a crowd are left out of all objects.
    prediction : list of Instance
    least_score : float
        Objects with lower scores are left out.
    things : set of int
        Labels of the countable classes; others are left out.

    Returns
    -------
    float
        0 to 1. Predicted objects may not share pixels: what several claim belongs to the one with the highest score (of
        equal ones to the first), and those left without pixels are no objects. 1 for nothing found where nothing is.
    """
    hidden = target.ignore | np.any(target.masks[target.crowd], axis=0)
    owner, labels = claim(prediction, least_score, things, hidden)
    areas = np.bincount(owner.ravel(), minlength=len(labels))
    best, count = np.zeros(len(labels)), 0
    for mask, label, crowd in zip(target.masks, target.labels.tolist(), target.crowd.tolist(), strict=True):
        mask = mask & ~hidden
        if crowd or label not in things or not mask.any():
            continue
        shared = np.bincount(owner[mask], minlength=len(labels))
        best = np.maximum(best, np.where(labels == label, shared / (mask.sum() + areas - shared), 0))
        count += 1
    hits = (best[:, None] > OVERLAPS).sum(axis=0)  # above one half, no two of disjoint objects can meet the same one
    every = count + np.count_nonzero(areas[1:]) - hits
    return float(np.mean(hits / every)) if every.all() else 1.0


def claim(prediction: list[Instance], least_score: float, things: set[int], hidden: np.ndarray):
    """Assign each pixel to the surest object that claims it.

    Returns
    -------
    owner : ndarray of int64, shape (H, W)
        0 where there is none (and where ``hidden``), else an object's place in ``labels``.
    labels : ndarray of int64
        -1, then a label for each object.
    """
    owner, labels = np.zeros(hidden.shape, dtype=np.int64), [-1]
    for each in sorted(prediction, key=lambda each: -each.score):
        if each.score >= least_score and each.label in things:
            owner[decode(each.rle) & (owner == 0) & ~hidden] = len(labels)
            labels.append(each.label)
    return owner, np.array(labels)
