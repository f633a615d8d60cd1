"""Images with a label each, from any source, transformed and put into batches.

A *source* has ``__len__``, ``load(index, epoch) -> (picture, label)``, ``name(index) -> str`` and ``order(generator)``,
the order of one epoch. ``ImageDataset`` puts transforms and the care for unreadable images around it.
"""

import random
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import Dataset

from ..common.errors import one_line
from .images import READ_ERRORS, ImageError

MOST_BAD_IN_A_ROW = 100


@dataclass
class Sample:
    """One item on its way into a batch; ``image`` is None where reading failed and the run is to stop.

    ``asked`` is the number the batch asked for, ``used`` the one it got: all between could not be read.
    """

    image: torch.Tensor | None
    label: int
    asked: int
    used: int


@dataclass
class Batch:
    """Images (B, 3, s, s) float32, labels (B,) int64, and the numbers asked for and used."""

    images: torch.Tensor | None
    labels: torch.Tensor
    asked: list[int]
    used: list[int]

    def pin_memory(self) -> "Batch":
        """Copy into pinned memory, from which copies to a GPU overlap with computing; the loader calls it."""
        images = None if self.images is None else self.images.pin_memory()
        return replace(self, images=images, labels=self.labels.pin_memory())

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device."""
        images, labels = (tensor.to(device, non_blocking=True) for tensor in (self.images, self.labels))
        return replace(self, images=images, labels=labels)


def collate(samples: list[Sample]) -> Batch:
    """Collate samples; images is None where one is to stop the run."""
    images = [sample.image for sample in samples]
    return Batch(
        None if any(image is None for image in images) else torch.stack(images),
        torch.tensor([sample.label for sample in samples]),
        [sample.asked for sample in samples],
        [sample.used for sample in samples],
    )


class ImageDataset(Dataset):
    """A source with transforms, whose randomness is a function of (seed, epoch, index) alone.

    Parameters
    ----------
    source : Folders, Shards or Digits
    transform : callable
        RGB picture -> (3, size, size) float32, normalised.
    seed : int
    on_bad_image : str
        "skip": the next readable image takes an unreadable one's place. "stop": the batch says that it failed.
    """

    collate = staticmethod(collate)
    notes: tuple[str, ...] = ()  # what the user should know of the data

    def __init__(self, source, transform, seed: int, on_bad_image: str):
        self.source, self.transform, self.seed, self.on_bad_image = source, transform, seed, on_bad_image

    def __len__(self):
        return len(self.source)

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in the order of their numbers; None where the data have numbers only."""
        names = getattr(self.source, "classes", None)
        return list(names) if names else None

    def describe(self) -> str:
        """Return what the images are for, in words."""
        return f"of {self.source.num_classes} classes"

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, asked = key
        for used in range(asked, asked + min(len(self), MOST_BAD_IN_A_ROW)):
            used %= len(self)
            try:
                picture, label = self.read(used, epoch)
            except ImageError:
                if self.on_bad_image == "stop":
                    break
                continue
            with isolated_random(self.seed, epoch, asked):
                return Sample(self.transform(picture), label, asked, used)
        return Sample(None, 0, asked, used)

    def read(self, index: int, epoch: int = 0):
        """Read an image and its label, or raise an ImageError that names it."""
        try:
            return self.source.load(index, epoch)
        except READ_ERRORS as error:
            raise ImageError(f"cannot read image {self.source.name(index)}: {one_line(error)}") from error


@contextmanager
def isolated_random(*key: int):
    """Seed python's, NumPy's and torch's generators from ``key`` for a while, then put back what they were."""
    saved = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = zlib.crc32(repr(key).encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(saved[0])
        np.random.set_state(saved[1])
        torch.set_rng_state(saved[2])
