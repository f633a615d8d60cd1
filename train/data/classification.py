"""Where images come from: class folders, shards or Scattered Digits, and what is done to each.

A *source* has ``__len__``, ``load(index, epoch) -> (picture, label)``, ``name(index) -> str`` and ``order(generator)``,
the order of one epoch. ``Samples`` puts transforms and the care for unreadable images around it.
"""

import random
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from timm.data import create_transform
from torch.utils.data import Dataset

from ..common.errors import UserError, one_line
from ..config.loader import Augment, Config, Data
from .images import READ_ERRORS, ImageError, describe_unread, list_pictures, open_rgb

MOST_BAD_IN_A_ROW = 100
LAYOUT = "expected train/ and val/ in it, each with a folder of images per class, or with .tar shards"


class Folders:
    """Class folders, as torchvision's ImageFolder has them; pictures lie in them at any depth, also behind links.

    Parameters
    ----------
    root : Path
        Folder with one folder of images per class; classes are numbered by name.
    """

    def __init__(self, root: Path):
        if not root.is_dir():
            raise UserError(f"no folder {root}: {LAYOUT}")
        self.classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        if not self.classes:
            raise UserError(f"{root} has no class folders: {LAYOUT}")
        self.num_classes, self.samples = len(self.classes), []
        for label, name in enumerate(self.classes):
            found = list_pictures(root / name)
            if not found:
                unread = describe_unread(root / name)
                raise UserError(f"{root / name} has no images: fill or remove this class{f'; {unread}' * bool(unread)}")
            self.samples += [(str(path), label) for path in found]

    def __len__(self):
        return len(self.samples)

    def name(self, index: int) -> str:
        """Give the path of an image."""
        return self.samples[index][0]

    def load(self, index: int, epoch: int = 0):
        """Read an image, the same in every epoch: (RGB picture, class number)."""
        path, label = self.samples[index]
        return open_rgb(path), label

    def order(self, generator: np.random.Generator) -> np.ndarray:
        """Draw one epoch's order of the images, (n,) int64."""
        return generator.permutation(len(self))


class Digits:
    """Scattered Digits as a source; training pictures are new in every epoch.

    Parameters
    ----------
    config : Config
    split : str
        "train" or "val".
    """

    def __init__(self, config: Config, split: str):
        from .digits import DigitsConfig, ScatteredDigits

        data, epochs = config.data, config.schedule.epochs if split == "train" else 1
        self.split, self.length, self.num_classes = split, getattr(data, f"{split}_length"), 10
        self.first_epochs = data.first_epochs if split == "train" else 0
        try:
            looks = [DigitsConfig(**look) for look in (data.digits, data.digits | data.digits_first)]
            length, seed = self.length * epochs, config.run.seed
            self.pictures = ScatteredDigits(looks[0], split, length, seed)
            self.first_pictures = ScatteredDigits(looks[1], split, length, seed) if self.first_epochs else None
        except (TypeError, ValueError) as error:
            raise UserError(f"data.digits: {one_line(error)}") from error

    def __len__(self):
        return self.length

    def name(self, index: int) -> str:
        """Give a name to a picture that is nowhere on disk."""
        return f"digits/{self.split}/{index}"

    def load(self, index: int, epoch: int = 0):
        """Render a picture: (RGB picture, digit)."""
        pictures = self.first_pictures if epoch < self.first_epochs else self.pictures
        return pictures[epoch * self.length + index]

    def order(self, generator: np.random.Generator) -> np.ndarray:
        """Draw one epoch's order of the pictures, (n,) int64."""
        return generator.permutation(len(self))


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

    def pinned(self) -> "Batch":
        """Copy into pinned memory, from which copies to a GPU overlap with computing."""
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.asked, self.used)


def collate(samples: list[Sample]) -> Batch:
    """Put samples together; images is None where one is to stop the run."""
    images = [sample.image for sample in samples]
    return Batch(
        None if any(image is None for image in images) else torch.stack(images),
        torch.tensor([sample.label for sample in samples]),
        [sample.asked for sample in samples],
        [sample.used for sample in samples],
    )


class Samples(Dataset):
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

    def __init__(self, source, transform, seed: int, on_bad_image: str):
        self.source, self.transform, self.seed, self.on_bad_image = source, transform, seed, on_bad_image

    def __len__(self):
        return len(self.source)

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


def open_samples(config: Config, split: str, source=None) -> Samples:
    """Open the images of a split ("train" or "val") with their transforms, or take a source that is open."""
    source = source or open_source(config, split)
    if source.num_classes is not None and source.num_classes != config.model.num_classes:
        raise UserError(
            f"the {split} images have {source.num_classes} classes but model.num_classes is "
            f"{config.model.num_classes}: pass --model.num_classes {source.num_classes}"
        )
    transform = train_transform(config) if split == "train" else test_transform(config.data)
    return Samples(source, transform, config.run.seed, config.data.on_bad_image)


def check_classes(train, val) -> None:
    """Refuse class folders of other names in val/ than in train/: they would be numbered differently."""
    names = [set(getattr(source, "classes", ())) for source in (train, val)]
    for here, there, words in ((*names, "train/ but not val/"), (*names[::-1], "val/ but not train/")):
        if all(names) and here - there:
            raise UserError(f"class folder {min(here - there)} is in {words}: both need the same classes")


def open_source(config: Config, split: str):
    """Open class folders, shards or digits, whichever the config says or the folder holds."""
    from .shards import Shards

    data = config.data
    if data.source == "digits":
        return Digits(config, split)
    patterns = getattr(data, split)
    if patterns:
        return Shards(patterns, data.shuffle_block, config.model.num_classes)
    if not data.path:
        raise UserError(f"no images named: pass --data PATH, {LAYOUT}; or try --config digits_nano")
    roots = [Path(path) / split for path in data.path]
    for root in roots:
        if not root.is_dir():
            raise UserError(f"no folder {root}: {LAYOUT}")
    if any(root.glob("*.tar") for root in roots) and all(list(root.glob("*.tar")) for root in roots):
        return Shards([str(root) for root in roots], data.shuffle_block, config.model.num_classes)
    if len(roots) > 1:
        raise UserError(f"several data folders are for .tar shards; {roots[0]} holds none: give one folder")
    return Folders(roots[0])


def train_transform(config: Config):
    """Build timm's training transform; Scattered Digits come new and at their size, and are taken as they are."""
    if config.data.source == "digits":
        return create_transform(config.data.size, is_training=True, no_aug=True)
    augment: Augment = config.augment
    return create_transform(
        config.data.size,
        is_training=True,
        scale=augment.scale,
        hflip=augment.flip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.randaugment,
        interpolation="bicubic",
        re_prob=augment.erasing,
        re_mode="pixel",
    )


def test_transform(data: Data):
    """Build the test transform: short side to test_resize, bicubic, then the central square."""
    return create_transform(data.size, interpolation="bicubic", crop_pct=data.size / (data.test_resize + 0.5))
