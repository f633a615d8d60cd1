"""Little vocabularies, samples and predictions for the tests of segmentation's evaluators."""

from typing import NamedTuple

import numpy as np
from cityscapesscripts.helpers.labels import labels as cityscapes_labels

from train.data.masks import encode
from train.data.sample import ClassInfo, Sample, Vocabulary
from train.inference.predictions import Instance, Panoptic

TOY = Vocabulary(
    (ClassInfo("one", 1, True, None), ClassInfo("two", 2, True, None), ClassInfo("sky", 9, False, None)), "toy"
)
CITY = Vocabulary(
    tuple(ClassInfo(c.name, c.id, c.hasInstances, c.color) for c in cityscapes_labels if not c.ignoreInEval),
    "cityscapes",
)
CITY_VOID = [c.id for c in cityscapes_labels if c.ignoreInEval]


class Segment(NamedTuple):
    """A segment as fast.postprocess gives it."""

    id: int
    label: int
    score: float
    is_thing: bool


def box(top, left, height, width, size=(20, 30)):
    """A mask with a filled rectangle."""
    mask = np.zeros(size, dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


def sample(masks, labels, name="a", crowd=None, ignore=None, size=(20, 30)):
    """A Sample of these masks."""
    masks = np.array(masks, dtype=bool).reshape(-1, *size)
    crowd = np.zeros(len(masks), dtype=bool) if crowd is None else np.array(crowd, dtype=bool)
    ignore = np.zeros(size, dtype=bool) if ignore is None else ignore
    picture = np.zeros((*size, 3), dtype=np.uint8)
    return Sample(picture, masks, np.array(labels, dtype=np.int64), crowd, ignore, name)


def instances(masks, labels, scores=None):
    """Instances of these masks, the first the surest."""
    scores = np.linspace(0.9, 0.5, len(labels)).tolist() if scores is None else scores
    return [Instance(int(lab), score, encode(mask)) for mask, lab, score in zip(masks, labels, scores, strict=True)]


def panoptic(masks, labels, vocabulary=TOY, size=(20, 30)):
    """A Panoptic of these masks, later ones on top; those that are hidden are left out."""
    numbers = np.zeros(size, dtype=np.int32)
    for number, mask in enumerate(masks, 1):
        numbers[mask] = number
    seen = [number for number in range(1, len(labels) + 1) if (numbers == number).any()]
    segments = [Segment(n, int(labels[n - 1]), 1.0, int(labels[n - 1]) in vocabulary.things) for n in seen]
    return Panoptic(numbers, segments)


def city_ids(seed, size=(60, 80)):
    """A random picture of Cityscapes' instanceIds: road and sky, cars, persons, a group of cars and void."""
    rng = np.random.default_rng(seed)
    ids = np.full(size, 7, dtype=np.int32)
    ids[: size[0] // 3] = 23
    for value in [0, 26, *(26000 + np.arange(4)), *(24000 + np.arange(3)), 4]:
        top, left = rng.integers(0, size[0] - 12), rng.integers(0, size[1] - 12)
        height, width = rng.integers(6, 25, 2)
        ids[top : top + height, left : left + width] = value
    return ids


def city_sample(ids, name, task):
    """A Sample of a picture of instanceIds."""
    values = [value for value in np.unique(ids).tolist() if value not in CITY_VOID]
    known = [(value, CITY.label_of[value if value < 1000 else value // 1000]) for value in values]
    if task == "instance":
        known = [(value, label) for value, label in known if label in CITY.things]
    crowd = [value < 1000 and label in CITY.things for value, label in known]
    masks, ignore = [ids == value for value, _ in known], np.isin(ids, CITY_VOID)
    return sample(masks, [label for _, label in known], name, crowd, ignore, ids.shape)


def shaken(target, seed):
    """Masks and labels like the target's: shifted by up to three pixels, some dropped, some of another class."""
    rng = np.random.default_rng(seed)
    kept = [k for k in range(len(target.masks)) if rng.random() > 0.15]
    masks = [np.roll(target.masks[k], rng.integers(-3, 4, 2), (0, 1)) for k in kept]
    labels = [int(target.labels[k] if rng.random() > 0.15 else rng.choice(target.labels)) for k in kept]
    return masks, labels
