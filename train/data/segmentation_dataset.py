"""Sources with transforms, bad pictures survived, and the batches that training takes."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fast.matching import Objects

from ..common.errors import one_line
from .classification_dataset import ImageDataset
from .images import READ_ERRORS, ImageError
from .sample import Sample
from .segmentation_transforms import EvalTransform, Prepared


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

    def pin_memory(self) -> "Batch":
        """Copy into pinned memory, from which copies to a GPU overlap with computing; the loader calls it."""
        if self.images is None:
            return self
        objects = [Objects(each.labels.pin_memory(), each.masks.pin_memory()) for each in self.objects]
        return replace(self, images=self.images.pin_memory(), objects=objects)

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device."""
        objects = [
            Objects(each.labels.to(device, non_blocking=True), each.masks.to(device, non_blocking=True))
            for each in self.objects
        ]
        return replace(self, images=self.images.to(device, non_blocking=True), objects=objects)


def collate(items: list[Item]) -> Batch:
    """Collate items; images is None where one is to stop the run."""
    images = [item.image for item in items]
    return Batch(
        None if any(image is None for image in images) else torch.stack(images),
        [item.objects for item in items],
        [item.asked for item in items],
        [item.used for item in items],
    )


class SegmentationDataset(ImageDataset):
    """A source with a transform, whose randomness is a function of (seed, epoch, index) alone.

    Parameters
    ----------
    source : object
        See :mod:`train.data.sample`.
    transform : callable
        Sample -> (image (3, S, S) float32, Objects).
    seed : int
    on_bad_image : {"skip", "stop"}
        "skip": the next usable picture takes a bad one's place. "stop": the batch says that it failed.
    """

    collate = staticmethod(collate)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in the order of their labels."""
        return [each.name for each in self.source.vocabulary.classes]

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of the data."""
        return tuple(getattr(self.source, "notes", ()))

    def describe(self) -> str:
        """Return what the pictures are for, in words."""
        vocabulary = self.source.vocabulary
        classes = f"{vocabulary.num_classes} classes ({len(vocabulary.things)} countable)"
        return f"for {self.source.task} segmentation, {classes}"

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


@dataclass
class EvalBatch:
    """One picture ready for testing, or None, with its target, and the numbers asked for and used, in lists of one."""

    images: Prepared | None
    target: Sample | None
    asked: list[int]
    used: list[int]

    def pin_memory(self) -> "EvalBatch":
        """Copy into pinned memory, from which copies to a GPU overlap with computing; the loader calls it."""
        if self.images is None:
            return self
        return replace(self, images=replace(self.images, image=self.images.image.pin_memory()))


@dataclass
class WithTarget:
    """A transform of pictures that gives each with its Sample; a class, as loader processes may have to pickle it."""

    transform: EvalTransform

    def __call__(self, sample: Sample) -> tuple[Prepared, Sample]:
        return self.transform(sample.image), sample


class EvalDataset(SegmentationDataset):
    """A source whose pictures are prepared for testing, one a batch, each with its Sample.

    Parameters
    ----------
    source : object
        See :mod:`train.data.sample`.
    transform : EvalTransform
    seed : int
    on_bad_image : {"skip", "stop"}
    """

    def __init__(self, source, transform: EvalTransform, seed: int, on_bad_image: str):
        super().__init__(source, WithTarget(transform), seed, on_bad_image)

    @staticmethod
    def collate(items: list[Item]) -> EvalBatch:
        """Take the one item there is."""
        (item,) = items
        return EvalBatch(item.image, item.objects, [item.asked], [item.used])
