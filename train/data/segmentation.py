"""From a config to training and validation pictures, and a vocabulary to and from a checkpoint."""

from dataclasses import replace
from pathlib import Path

from ..common.errors import UserError, one_line
from ..config.segmentation import Config, Data
from . import cityscapes
from .cached_source import CachedSource
from .digits_segmentation import LOOK, DigitsSource
from .formats import LAYOUTS, open_source
from .sample import ClassInfo, Vocabulary
from .segmentation_dataset import EvalDataset, SegmentationDataset
from .segmentation_transforms import EvalTransform, LargeJitter, ShortSide, TrainTransform, unscaled


def open_sets(config: Config) -> tuple[SegmentationDataset, EvalDataset]:
    """Open the training and validation pictures with their transforms.

    Parameters
    ----------
    config : Config
        ``model.num_classes`` is filled in if it is None.

    Raises
    ------
    UserError
        No such data, or classes that differ between the splits or from the config.
    """
    train, val = open_split(config, "train"), open_val(config)
    here, there = ([each.name for each in source.vocabulary.classes] for source in (train, val))
    if here != there:
        odd = sorted(set(here) ^ set(there)) or ["their order"]
        raise UserError(f"training and validation data differ in their classes: {', '.join(map(str, odd[:5]))}")
    settle_classes(config, train.vocabulary)
    if not getattr(train, "objects", True):
        raise UserError(f"{train.path}: {train.nothing()}")
    data, seed = config.data, config.run.seed
    if data.cache and data.source == "images":
        train, val = CachedSource(train), CachedSource(val)
    train_set = SegmentationDataset(train, train_transform(data), seed, data.on_bad_image)
    return train_set, EvalDataset(val, EvalTransform(data.test_short, data.test_longest), seed, data.on_bad_image)


def check_pictures(source, on_bad_image: str) -> None:
    """Notice pictures that are not there before training, not at the first evaluation.

    Raises
    ------
    UserError
        None is there, or one is missing and is to stop the run; if it is to be skipped, the source has a note of it.
    """
    missing = source.missing() if hasattr(source, "missing") else []
    if not missing:
        return
    count = f"{len(missing)} of {len(source)} pictures, or their masks, are not there"
    try:
        source.find_picture(missing[0])
    except UserError as error:
        if on_bad_image == "stop" or len(missing) == len(source):
            raise UserError(f"{count}: {error}") from error
        source.notes = [*source.notes, f"{count} and are skipped; the first: {error}"]


def open_val(config: Config):
    """Open the validation pictures' source."""
    return open_split(config, "val")


def open_split(config: Config, split: str):
    """Open the source of a split ("train" or "val")."""
    data = config.data
    if data.source == "digits":
        return open_digits(config, split)
    if not data.path:
        raise UserError(f"no pictures named: pass --data PATH, {LAYOUTS}; or try --config digits_panoptic_nano")
    path = Path(data.path[-1 if split == "val" else 0])
    if path.suffix == ".json" and len(data.path) == 1:
        raise UserError(f"{path} is one split: pass --data TRAIN.json,VAL.json")
    images = Path(data.images[-1 if split == "val" else 0]) if data.images else None
    return open_source(path, split, data.task, data.kind, images, data.skip_empty and split == "train", data.boxes)


def open_digits(config: Config, split: str) -> DigitsSource:
    """Open Scattered Digits, with new pictures in every pass of training."""
    data, train = config.data, split == "train"
    passes = -(-config.schedule.max_steps * config.run.total_batch // data.train_length) if train else 1
    length = data.train_length if train else data.val_length
    changes = {key: tuple(value) if isinstance(value, list) else value for key, value in data.digits.items()}
    try:
        look = replace(LOOK, **changes)
        return DigitsSource(split, length, data.task or "panoptic", look, config.run.seed, passes)
    except (TypeError, ValueError) as error:
        raise UserError(f"data.digits: {one_line(error)}") from error


def settle_classes(config: Config, vocabulary: Vocabulary) -> None:
    """Take the number of classes from the data, or see that the config agrees."""
    if config.model.num_classes is None:
        config.model.num_classes = vocabulary.num_classes
    if config.model.num_classes != vocabulary.num_classes:
        raise UserError(
            f"the data have {vocabulary.num_classes} classes but model.num_classes is {config.model.num_classes}: "
            f"pass --model.num_classes {vocabulary.num_classes}"
        )


def train_transform(data: Data) -> TrainTransform:
    """Create what the config says is done to training pictures."""
    resize = {
        "short_side": lambda: ShortSide(data.base, data.scales, data.longest),
        "large_jitter": lambda: LargeJitter(data.crop, data.scales),
        "none": lambda: unscaled,
    }[data.resize]()
    return TrainTransform(resize, data.crop, data.most_of_one, data.jitter, data.flip)


def pack_vocabulary(vocabulary: Vocabulary) -> dict:
    """Write a vocabulary as plain containers."""
    return {"name": vocabulary.name, "classes": [dict(vars(each)) for each in vocabulary.classes]}


def unpack_vocabulary(packed: dict) -> Vocabulary:
    """Read what ``pack_vocabulary`` wrote."""
    classes = [each | {"color": tuple(each["color"]) if each["color"] else None} for each in packed["classes"]]
    return Vocabulary(tuple(ClassInfo(**each) for each in classes), packed["name"])


def known_vocabulary(config: Config) -> Vocabulary:
    """Return the classes of a config whose data may be absent: the data's where a path is named, or Cityscapes' own.

    Others are numbered; they are countable if the task is instance.
    """
    data = config.data
    if data.path or data.source == "digits":
        return open_split(config, "val").vocabulary
    if data.kind == "cityscapes":
        return cityscapes.vocabulary(data.task or "panoptic")
    if config.model.num_classes is None:
        raise UserError("the classes are unknown: pass --data PATH or --model.num_classes")
    thing, numbers = data.task == "instance", range(1, config.model.num_classes + 1)
    return Vocabulary(tuple(ClassInfo(f"class {i}", i, thing, None) for i in numbers), data.kind or "numbered")
