"""Where people keep COCO's jsons and their pictures.

=================================================  ========================================
json                                               pictures
=================================================  ========================================
annotations/instances_train2017.json               train2017/             (COCO's own tree)
annotations/train.json, .../instances_train.json   train/ or images/train/ or images/
train.json, instances_train.json                   train/ or images/train/ or images/
train/_annotations.coco.json                       train/                 (Roboflow)
=================================================  ========================================

The same with ``panoptic_``, and for validation with val, valid or validation.
"""

import os
from pathlib import Path

from ..common.errors import UserError
from .coco_json import task_of

NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation")}
PREFIXES = {"instance": "instances_", "panoptic": "panoptic_"}
ROBOFLOW = "_annotations.coco.json"
LOOKED_AT = 20  # pictures by which a json's folder is found


def find_json(root: Path, split: str, task: str) -> Path | None:
    """Find a split's json of a task; a file whose name does not say the task is opened to see."""
    for name in NAMES[split]:
        for folder in (root / "annotations", root):
            for year in ("2017", ""):
                path = folder / f"{PREFIXES[task]}{name}{year}.json"
                if os.path.isfile(path):
                    return path
    plain = [folder / f"{name}.json" for name in NAMES[split] for folder in (root / "annotations", root)]
    plain += [root / name / ROBOFLOW for name in NAMES[split]]
    return next((path for path in plain if is_coco(path, task)), None)


def is_coco(path: Path, task: str) -> bool:
    """Whether a file is a COCO json of a task."""
    try:
        return os.path.isfile(path) and task_of(path) == task
    except UserError:
        return False


def has_json(root: Path, task: str) -> bool:
    """Whether there is a json of a task, for any split."""
    return any(find_json(root, split, task) for split in NAMES)


def find_pictures(path: Path, names: list[str], masks: Path | None = None) -> Path:
    """Find the folder of a json's pictures: that where most of the first ones are.

    Parameters
    ----------
    path : Path
        The json.
    names : list of str
        File names in it.
    masks : Path, optional
        Folder of a panoptic json's masks, which is not looked at.

    Returns
    -------
    Path
        Of several, the first of: images/ beside it, the folder named like it or its split, its own, and the same a
        folder further up; images/ beside it, or else its own folder, where no picture is found.
    """
    stem = path.stem
    for prefix in PREFIXES.values():
        stem = stem.removeprefix(prefix)
    near = []
    for root in (path.parent, path.parent.parent):
        near += [root / "images", root / stem, root / "images" / stem, root]
    near = [folder for folder in near if folder.is_dir() and folder != masks]
    counts = [sum(os.path.isfile(folder / name) for name in names[:LOOKED_AT]) for folder in near]
    if counts and max(counts):
        return near[counts.index(max(counts))]
    return near[0] if near and near[0].name == "images" else path.parent
