"""Which data set a path holds, and opening it."""

from pathlib import Path

from ..errors import UserError
from . import ade20k, cityscapes, coco, digits, folders
from .types import TASKS

KINDS = ("ade20k", "cityscapes", "coco", "folder", "digits")
TASKS_OF = {"ade20k": ("semantic",), "coco": ("instance", "panoptic")}
DIGITS_LENGTH = 1000
LAYOUTS = (
    "expected ADE20K (images/training), Cityscapes (leftImg8bit/), COCO (annotations/instances_train2017.json), "
    "a COCO json, or images/ and masks/"
)


def guess(path: Path) -> str:
    """Tell the kind of a data set from its layout.

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
    signs = {"ade20k": "images/training", "cityscapes": "leftImg8bit", "folder": "images", "": "train/images"}
    for kind, sign in signs.items():
        if (path / sign).is_dir():
            return kind or "folder"
    raise UserError(f"{path} looks like no known data set: {LAYOUTS}")


def tasks_of(path: Path, kind: str) -> tuple[str, ...]:
    """List what a data set can be opened for, the richest last."""
    if path.suffix == ".json":
        return ("panoptic",) if is_panoptic(path) else ("instance",)
    if kind == "coco":
        found = [task for task in TASKS_OF[kind] if has_json(path, task)]
        return tuple(found) or TASKS_OF[kind]
    if kind == "folder":
        return TASKS if folders.id_table(path, "semantic").vocabulary.things else ("semantic",)
    return TASKS_OF.get(kind, TASKS)


def open_source(
    path: Path,
    split: str,
    task: str | None = None,
    kind: str | None = None,
    images: Path | None = None,
    skip_empty: bool = False,
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
        Folder of a COCO json's pictures.
    skip_empty : bool
        COCO: leave out pictures without objects, as the published training does.

    Returns
    -------
    source
        See :mod:`train.segmentation.types`.

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
    if kind == "digits":
        return digits.DigitsSource(split, DIGITS_LENGTH, task)
    return open_coco(path, split, task, images, skip_empty)


def open_coco(path: Path, split: str, task: str, images: Path | None, skip_empty: bool):
    """Open COCO's official tree, or any json of its form."""
    official = path.suffix != ".json"
    file = official_json(path, split, task) if official else path
    pictures = images or (path / f"{split}2017" if official else picture_folder(path))
    if task == "panoptic":
        return coco.PanopticSource(file, file.with_suffix(""), pictures, skip_empty=skip_empty)
    return coco.InstanceSource(file, pictures, skip_empty=skip_empty)


def picture_folder(path: Path) -> Path:
    """Find a json's pictures: images/ beside it if there is one, else its own folder."""
    beside = path.parent / "images"
    return beside if beside.is_dir() else path.parent


def official_json(root: Path, split: str, task: str) -> Path:
    """Give the path of COCO's json for a split and task."""
    return root / "annotations" / f"{'instances' if task == 'instance' else 'panoptic'}_{split}2017.json"


def has_json(root: Path, task: str) -> bool:
    """Whether COCO's json of a task is there, for any split."""
    return any(official_json(root, split, task).is_file() for split in ("train", "val"))


def is_panoptic(path: Path) -> bool:
    """Whether a json's annotations list segments."""
    entries = coco.read_json(path, coco.KEYS | {"annotations": ("image_id",)})["annotations"]
    return bool(entries) and "segments_info" in entries[0]
