"""Sources with transforms, bad pictures survived, and the batches that training takes."""

from dataclasses import dataclass

import torch
from fast.matching import Objects
from torch import Tensor

from ..data import READ_ERRORS, ImageError, Samples
from ..errors import one_line
from .types import Sample


@dataclass
class Item:
    """One picture (3, S, S) with its objects on their way into a batch; None where the run is to stop.

    ``asked`` is the number the batch asked for, ``used`` the one it got: all between could not be used.
    """

    image: Tensor | None
    objects: Objects | None
    asked: int
    used: int


@dataclass
class Batch:
    """Images (B, 3, S, S) float32 or None, one Objects each, and the numbers asked for and used."""

    images: Tensor | None
    objects: list[Objects]
    asked: list[int]
    used: list[int]


class SegmentationSamples(Samples):
    """A source with a transform, whose randomness is a function of (seed, epoch, index) alone.

    Parameters
    ----------
    source : object
        See :mod:`train.segmentation.types`.
    transform : callable
        Sample -> (image (3, S, S) float32, Objects).
    seed : int
    on_bad_image : {"skip", "stop"}
        "skip": the next usable picture takes a bad one's place. "stop": the batch says that it failed.
    """

    def __getitem__(self, key: tuple[int, int]) -> Item:
        found = super().__getitem__(key)
        image, objects = found.image or (None, None)
        return Item(image, objects, found.asked, found.used)

    def read(self, index: int, epoch: int = 0) -> tuple[Sample, int]:
        """Read a sample (and 0, where classification has the class), or raise an ImageError that names it."""
        try:
            return self.source.load(index, epoch), 0
        except ImageError:
            raise
        except READ_ERRORS as error:
            raise ImageError(f"cannot use {self.source.name(index)}: {one_line(error)}") from error


def collate(items: list[Item]) -> Batch:
    """Put items together; images is None where one is to stop the run."""
    images = [item.image for item in items]
    return Batch(
        None if any(image is None for image in images) else torch.stack(images),
        [item.objects for item in items],
        [item.asked for item in items],
        [item.used for item in items],
    )
