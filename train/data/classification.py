"""From a config to the images of a classifier: class folders, shards or Scattered Digits, and their transforms."""

from pathlib import Path

from timm.data import create_transform

from ..common.errors import UserError
from ..config.classification import Augment, Config, Data
from .classification_dataset import ImageDataset
from .digits_classification import Digits
from .image_folders import LAYOUT, Folders


def open_samples(config: Config, split: str, source=None) -> ImageDataset:
    """Open the images of a split ("train" or "val") with their transforms, or take a source that is open."""
    source = source or open_source(config, split)
    if source.num_classes is not None and source.num_classes != config.model.num_classes:
        raise UserError(
            f"the {split} images have {source.num_classes} classes but model.num_classes is "
            f"{config.model.num_classes}: pass --model.num_classes {source.num_classes}"
        )
    transform = train_transform(config) if split == "train" else test_transform(config.data)
    return ImageDataset(source, transform, config.run.seed, config.data.on_bad_image)


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
