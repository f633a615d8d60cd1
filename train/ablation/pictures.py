"""The pictures of ``train.ablate``'s rows: opened once a seed, one class for all digits, kept in memory."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ..config import classification as base
from ..config.segmentation import Config
from ..data.digits import CLASSES
from ..data.sample import ClassInfo, Sample, Vocabulary
from ..data.segmentation import open_sets
from ..data.segmentation_dataset import EvalDataset, SegmentationDataset


class AnyDigit:
    """Scattered Digits (a DigitsSource) with one class for all digits, before any of the photographs' kinds."""

    def __init__(self, source):
        first, *others = source.vocabulary.classes[len(CLASSES) - 1 :]
        kinds = [ClassInfo(kind.name, number, False, kind.color) for number, kind in enumerate(others, 1)]
        self.source, self.vocabulary = source, Vocabulary((ClassInfo("digit", 0, True, first.color), *kinds), "digits")

    def load(self, index: int, epoch: int = 0) -> Sample:
        """Render a picture with its masks."""
        sample = self.source.load(index, epoch)
        return replace(sample, labels=np.maximum(sample.labels - len(CLASSES) + 1, 0))

    def __len__(self):
        return len(self.source)

    def __getattr__(self, name):
        return getattr(self.source, name)


class Remembered:
    """Samples that are prepared once, for all rows of a seed."""

    def __init__(self, samples):
        self.samples, self.found = samples, {}

    def __getitem__(self, key):
        if key not in self.found:
            self.found[key] = self.samples[key]
        return self.found[key]

    def __len__(self):
        return len(self.samples)

    def __getattr__(self, name):
        return getattr(self.samples, name)


class Shared:
    """What a table's rows have in common: the data sets of the seed at hand, opened once."""

    def __init__(self):
        self.seed, self.sets = None, {}

    def open(self, config: base.Config | Config, open_sets: Callable) -> tuple:
        """Return a training's training and validation set; ``open_sets()`` opens those that no row had before."""
        if config.run.seed != self.seed:
            self.seed, self.sets = config.run.seed, {}
        data = config.data.model_dump_json()
        if data not in self.sets:
            self.sets[data] = open_sets()
        return self.sets[data]


def remember(sets) -> tuple[Remembered, Remembered]:
    """Prepare the samples of a training and a validation set once, for all rows."""
    return tuple(Remembered(samples) for samples in sets)


def open_digits(config: Config, one_class: bool) -> tuple[Remembered, Remembered]:
    """Open Scattered Digits to train and to validate, with one class for all digits if asked."""
    sets = open_sets(config)
    for samples in sets if one_class else ():
        samples.source = AnyDigit(samples.source)
    return remember(sets)


def open_images(config: Config) -> tuple[SegmentationDataset, EvalDataset]:
    """Open images on disk to train and to validate; they are held in memory, not their many crops."""
    config.data.cache = True
    return open_sets(config)
