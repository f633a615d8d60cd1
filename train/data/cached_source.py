"""Pictures on disk that are read once and held in memory."""

from dataclasses import replace

import numpy as np

from .masks import box
from .sample import Sample


class CachedSource:
    """A source of pictures on disk that reads each once; of a mask only what is in its box is kept.

    Every process that loads pictures holds those that it has read.

    Parameters
    ----------
    source : object
        See :mod:`train.data.sample`; one whose pictures are the same in every epoch.
    """

    def __init__(self, source):
        self.source, self.found = source, {}

    def load(self, index: int, epoch: int = 0) -> Sample:
        """Return a sample like the source's."""
        if index not in self.found:
            sample = self.source.load(index)
            boxes = [box(mask) if mask.any() else [0, 0, 0, 0] for mask in sample.masks]
            places = [(slice(y, y + height), slice(x, x + width)) for x, y, width, height in boxes]
            parts = [(place, mask[place].copy()) for place, mask in zip(places, sample.masks, strict=True)]
            self.found[index] = replace(sample, masks=np.zeros((0, 0, 0), bool)), parts
        sample, parts = self.found[index]
        masks = np.zeros((len(parts), *sample.ignore.shape), bool)
        for mask, (place, part) in zip(masks, parts, strict=True):
            mask[place] = part
        return replace(sample, masks=masks)

    def __len__(self):
        return len(self.source)

    def __getattr__(self, name):
        if name.startswith("__"):  # as pickle asks for, before there is a source
            raise AttributeError(name)
        return getattr(self.source, name)
