"""Which data set a path holds, and opening it."""

from pathlib import Path

from ..common.errors import UserError
from . import ade20k, cityscapes, coco, labelme, voc
from . import digits_segmentation as digits
from . import mask_folders as folders
from .coco_json import task_of
from .coco_layouts import find_json, has_json
from .sample import TASKS

KINDS = ("ade20k", "cityscapes", "coco", "voc", "labelme", "folder", "digits")
TASKS_OF = {"ade20k": ("semantic",), "coco": ("instance", "panoptic"), "labelme": ("semantic", "instance")}
DIGITS_LENGTH = 1000
LAYOUTS = (
    "expected ADE20K (images/training), Cityscapes (leftImg8bit/), COCO (annotations/instances_train2017.json, "
    "annotations/train.json or train.json), a COCO json, Pascal VOC (JPEGImages/ with Annotations/ or "
    "SegmentationClass/), labelme's jsons beside the pictures, or images/ and masks/"
)


def guess(path: Path) -> str:
    """Return the kind of a data set from its layout.

    Parameters
    ----------
    path : Path
        A folder or a json.

    Returns
    -------
    str
        One of KINDS.

    Raises
    ------
    UserError
        It looks like none.
    """
    if path == Path("digits"):
        return "digits"
    if not path.exists():
        raise UserError(f"no file or folder {path}: {LAYOUTS}")
    if path.suffix == ".json" or any(has_json(path, task) for task in TASKS_OF["coco"]):
        return "coco"
    if all((path / kind / "training").is_dir() for kind in ("images", "annotations")):
        return "ade20k"
    if (path / "leftImg8bit").is_dir():
        return "cityscapes"
    if voc.is_voc(path):
        return "voc"
    if labelme.is_labelme(path):
        return "labelme"
    if (path / "images").is_dir() or folders.has_splits(path):
        return "folder"
    raise UserError(f"{path} looks like no known data set: {LAYOUTS}")


def tasks_of(path: Path, kind: str) -> tuple[str, ...]:
    """List what a data set can be opened for, the richest last."""
    if path.suffix == ".json":
        return (task_of(path),)
    if kind == "coco":
        found = [task for task in TASKS_OF[kind] if has_json(path, task)]
        return tuple(found) or TASKS_OF[kind]
    if kind == "voc":
        return voc.tasks_of(path)
    if kind == "folder":
        return TASKS if folders.category_map(path, "semantic")[0].vocabulary.things else ("semantic",)
    return TASKS_OF.get(kind, TASKS)


def open_source(
    path: Path,
    split: str,
    task: str | None = None,
    kind: str | None = None,
    images: Path | None = None,
    skip_empty: bool = False,
    boxes: bool = False,
):
    """Open one split of a data set.

    Parameters
    ----------
    path : Path
        Root folder, a COCO json (which is one split of its own), or "digits" (for settings: DigitsSource).
    split : {"train", "val"}
    task : {"semantic", "instance", "panoptic"}, optional
        By default the richest that the data have.
    kind : str, optional
        One of KINDS; guessed by default.
    images : Path, optional
        Folder of the pictures of COCO's or labelme's jsons.
    skip_empty : bool
        COCO: leave out pictures without objects, as the published training does.
    boxes : bool
        COCO: take the box of an object without an outline for its mask; Pascal VOC: take the boxes.

    Returns
    -------
    source
        See :mod:`train.data.sample`.

    Raises
    ------
    UserError
        Files are missing, or the data have no annotations for the task.
    """
    kind = kind or guess(path)
    if kind not in KINDS or split not in ("train", "val"):
        raise UserError(f"no split {split!r} of {kind!r}: splits are train and val, kinds {', '.join(KINDS)}")
    tasks = tasks_of(path, kind)
    task = task or tasks[-1]
    if task not in tasks:
        raise UserError(f"{kind} data at {path} are for {' or '.join(tasks)}, not for {task}: pass one of these")
    if kind == "ade20k":
        return ade20k.open_ade20k(path, split)
    if kind == "cityscapes":
        return cityscapes.open_cityscapes(path, split, task)
    if kind == "folder":
        return folders.open_folder(path, split, task)
    if kind == "voc":
        return voc.open_voc(path, split, task, boxes)
    if kind == "labelme":
        return labelme.open_labelme(path, split, task, images)
    if kind == "digits":
        return digits.DigitsSource(split, DIGITS_LENGTH, task)
    return open_coco(path, split, task, images, skip_empty, boxes)


def open_coco(path: Path, split: str, task: str, images: Path | None, skip_empty: bool, boxes: bool):
    """Open COCO's official tree, one laid out like it, or any json of its form."""
    file = path if path.suffix == ".json" else find_json(path, split, task)
    if not file:
        expected = f"annotations/{split}.json or annotations/instances_{split}2017.json"
        raise UserError(f"no json for {split} in {path} for task {task}: expected {expected}")
    if images is None and (path / f"{split}2017").is_dir():
        images = path / f"{split}2017"
    if task == "panoptic":
        return coco.PanopticSource(file, file.with_suffix(""), images, skip_empty=skip_empty)
    return coco.InstanceSource(file, images, skip_empty=skip_empty, boxes=boxes)
