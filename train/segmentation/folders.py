"""Anyone's own data: a folder of pictures and a folder of masks drawn as numbers.

::

    DATA/images/a.jpg       DATA/masks/a.png      a PNG of class ids for each picture, under the same name
    DATA/classes.json       optional: {"names": {"1": "cat", "7": "grass"}, "things": ["cat"], "ignore": [0, 255]}

DATA may hold ``train/`` and ``val/``, each with images/ and masks/; without them every tenth picture is for validation.
Without classes.json the classes are the ids that the masks hold, but 255, which is ignored. ``things`` makes classes
countable: object n of class c is then drawn as 1000 c + n (16-bit PNG), as in Cityscapes.
"""

import json
from pathlib import Path

from tqdm import tqdm

from ..errors import UserError, one_line
from ..reading import list_pictures
from .ids import PER_CLASS, IdSource, IdTable, distinct
from .pictures import DataError, read_ids
from .types import ClassInfo, Vocabulary

CLASSES = "classes.json"
SPLITS = ("train", "val")
IGNORED = 255
EVERY = 10  # without split folders, each so many pictures one is for validation
FORMAT = '{"names": {"1": "cat", "7": "grass"}, "things": ["cat"], "ignore": [0, 255]}'


def open_folder(root: Path, split: str, task: str = "semantic") -> IdSource:
    """Open one split of a folder.

    Parameters
    ----------
    root : Path
    split : {"train", "val"}
    task : {"semantic", "instance", "panoptic"}

    Raises
    ------
    UserError
        No pictures, or a classes.json that cannot be used.
    """
    table = id_table(root, task)
    if task != "semantic" and not table.vocabulary.things:
        raise UserError(f"{root} has no countable classes for task {task}: name them under things in {CLASSES}")
    files = list_files(root, split)
    if not files:
        raise UserError(f"no pictures for {split} in {root}: expected images/ and masks/, or {split}/images/ ...")
    return IdSource(files, table, task)


def list_files(root: Path, split: str) -> list[tuple[str, Path, Path]]:
    """List a split's (name, picture, mask)."""
    if has_splits(root):
        return pairs(root / split)
    files = pairs(root)
    held = files[EVERY - 1 :: EVERY] or files[-1:]
    return held if split == "val" else [file for file in files if file not in held]


def has_splits(root: Path) -> bool:
    """Whether a folder holds train/images."""
    return (root / SPLITS[0] / "images").is_dir()


def pairs(folder: Path) -> list[tuple[str, Path, Path]]:
    """Pair the pictures under images/ with the masks under masks/ by name."""
    found = []
    for picture in list_pictures(folder / "images"):
        name = picture.relative_to(folder / "images").with_suffix("")
        found.append((name.as_posix(), picture, folder / "masks" / f"{name}.png"))
    return found


def id_table(root: Path, task: str) -> IdTable:
    """Read what the numbers mean from classes.json, or take those there are."""
    path = root / CLASSES
    names, things, ignored = read_classes(path) if path.is_file() else (found_names(root), set(), {IGNORED})
    infos = [ClassInfo(name, i, name in things, None) for i, name in sorted(names.items())]
    wanted = [each for each in infos if each.is_thing or task != "instance"]
    background = frozenset(each.id for each in infos if each not in wanted)
    advice = f"name them, or list them under ignore, in {path}: {FORMAT}"
    vocabulary = Vocabulary(tuple(wanted), root.resolve().name)
    return IdTable(vocabulary, frozenset(ignored), background, numbered=bool(things), advice=advice)


def read_classes(path: Path) -> tuple[dict[int, str], set[str], set[int]]:
    """Read classes.json: names by id, countable names, ignored ids."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = content["names"]
        names = dict(enumerate(names)) if isinstance(names, list) else {int(i): name for i, name in names.items()}
        ignored = content.get("ignore", [])
        ignored = {int(i) for i in (ignored if isinstance(ignored, list) else [ignored])}
        things = set(content.get("things", []))
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise UserError(f"{path} cannot be used ({one_line(error)}): expected {FORMAT}") from error
    if things - set(names.values()):
        raise UserError(f"{path}: {min(things - set(names.values()))!r} under things is not under names: add it there")
    if not names or ignored & names.keys():
        trouble = f"id {min(ignored & names.keys())} is named and ignored" if names else "it names no class"
        raise UserError(f"{path}: {trouble}: expected {FORMAT}")
    if things and max(names) >= PER_CLASS:
        raise UserError(f"{path}: with things, ids must be below {PER_CLASS}, but {max(names)} is named: renumber it")
    return names, things, ignored


def found_names(root: Path) -> dict[int, str]:
    """Read every mask of all splits and name each id found after itself; unreadable masks are met again later."""
    folders = [root / split for split in SPLITS] if has_splits(root) else [root]
    masks = [mask for folder in folders for _, _, mask in pairs(folder)]
    ids = set()
    for mask in tqdm(masks, f"looking for ids ({CLASSES} would save this)", leave=False, disable=None):
        try:
            ids.update(distinct(read_ids(mask))[0].tolist())
        except DataError:
            continue
    if not ids - {IGNORED}:
        raise UserError(f"no mask under {root} could be read: expected masks/NAME.png for each images/NAME.jpg")
    return {i: f"class {i}" for i in sorted(ids - {IGNORED})}
