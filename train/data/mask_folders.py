"""Anyone's own data: a folder of pictures and a folder of masks drawn as numbers.

::

    DATA/images/a.jpg       DATA/masks/a.png      a PNG of class ids for each picture, under the same name
    DATA/classes.json       optional: {"names": {"1": "cat", "7": "grass"}, "things": ["cat"], "ignore": [0, 255]}

DATA may hold ``train/`` and ``val/``, each with images/ and masks/, or images/ and masks/ may each hold train/ and
val/; without them every tenth picture is for validation. Without classes.json the classes are the ids that the masks
hold, but 255, which is ignored where there are others than 0 and 255. ``things`` makes classes countable: object n of
class c is then drawn as 1000 c + n (16-bit PNG), as in Cityscapes. A mask may be a_mask.png, or .tif, .bmp, .gif.
"""

import os
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from ..common.errors import UserError, one_line
from .category_maps import PER_CLASS, CategoryMap, MaskSource, distinct
from .coco_json import check_names, parse_json, shown, text, whole
from .coco_layouts import NAMES
from .images import describe_unread, list_pictures, walk_files
from .mask_files import DataError, read_ids
from .sample import ClassInfo, Vocabulary

CLASSES = "classes.json"
IGNORED = 255
EVERY = 10  # without split folders, each so many pictures one is for validation
MOST_FOUND = 100  # ids taken for classes without classes.json
SOFT = 8  # so many grey levels between 0 and 255 may be softened edges
MASKS = (".png", ".tif", ".tiff", ".bmp", ".gif")  # without loss, best first
FORMAT = '{"names": {"1": "cat", "7": "grass"}, "things": ["cat"], "ignore": [0, 255]}'


def open_folder(root: Path, split: str, task: str = "semantic") -> MaskSource:
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
    table, notes = category_map(root, task)
    if task != "semantic" and not table.vocabulary.things:
        raise UserError(f"{root} has no countable classes for task {task}: name them under things in {CLASSES}")
    files, unread = list_files(root, split), describe_unread(root)
    if not files:
        more = f" ({unread})" if unread else ""
        raise UserError(f"no pictures for {split} in {root}{more}: expected images/ and masks/, or {split}/images/ ...")
    return MaskSource(files, table, task, [*notes, *([unread] if unread else [])])


def list_files(root: Path, split: str) -> list[tuple[str, Path, Path]]:
    """List a split's (name, picture, mask)."""
    if has_splits(root):
        return pairs(split_folders(root, split))
    files = pairs((root / "images", root / "masks"))
    return hold_out(files, split)


def hold_out(files: list, split: str) -> list:
    """Choose every tenth file, at least one, for the split "val", and the others for "train"."""
    held = range(EVERY - 1, len(files), EVERY) or range(len(files))[-1:]
    return [file for place, file in enumerate(files) if (place in held) == (split == "val")]


def split_folders(root: Path, split: str) -> tuple[Path, Path] | None:
    """Find a split's folders of pictures and of masks."""
    for name in NAMES[split]:
        inner = (root / name / "images", root / name / "masks"), (root / "images" / name, root / "masks" / name)
        for images, masks in inner:
            if images.is_dir() and (masks.is_dir() or images.name == "images"):
                return images, masks
    return None


def has_splits(root: Path) -> bool:
    """Whether a folder's pictures are split into those for training and others."""
    return split_folders(root, "train") is not None


def pairs(folders: tuple[Path, Path] | None) -> list[tuple[str, Path, Path]]:
    """Pair the pictures of one folder with the masks of another by name; NAME.png where there is no mask."""
    if folders is None:
        return []
    images, masks = folders
    there = {}
    for path in walk_files(masks) if masks.is_dir() else ():
        inner = path.relative_to(masks)
        if inner.suffix.lower() in MASKS:
            rank = MASKS.index(inner.suffix.lower()), inner.suffix != inner.suffix.lower()
            there.setdefault(inner.with_suffix("").as_posix(), []).append((rank, path))
    found = []
    for picture in list_pictures(images):
        name = picture.relative_to(images).with_suffix("").as_posix()
        options = there.get(name) or there.get(f"{name}_mask") or [(0, masks / f"{name}.png")]
        found.append((name, picture, min(options)[1]))
    return found


def category_map(root: Path, task: str) -> tuple[CategoryMap, list[str]]:
    """Read what the numbers mean from classes.json, or take those there are; with what is worth knowing of that."""
    path = root / CLASSES
    notes = []
    if os.path.isfile(path):
        names, things, ignored = read_classes(path)
    else:
        (names, ignored, notes), things = found_names(root), set()
    infos = [ClassInfo(name, i, name in things, None) for i, name in sorted(names.items())]
    wanted = [each for each in infos if each.is_thing or task != "instance"]
    background = frozenset(each.id for each in infos if each not in wanted)
    advice = f"name them, or list them under ignore, in {path}: {FORMAT}"
    vocabulary = Vocabulary(tuple(wanted), root.resolve().name)
    return CategoryMap(vocabulary, frozenset(ignored), background, numbered=bool(things), advice=advice), notes


def read_classes(path: Path) -> tuple[dict[int, str], set[str], set[int]]:
    """Read classes.json: names by id, countable names, ignored ids."""
    content = parse_json(path, f"expected {FORMAT}")
    try:
        names = content["names"]
        pairs = list(enumerate(names) if isinstance(names, list) else names.items())
        names = {number(i): text(name) for i, name in pairs}
        ignored = content.get("ignore", [])
        ignored = {number(i) for i in (ignored if isinstance(ignored, list) else [ignored])}
        things = {text(each) for each in content.get("things", [])}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} cannot be used ({one_line(error)}): expected {FORMAT}") from error
    if len(names) < len(pairs):
        raise UserError(f"{path} names one id twice, such as 1 and 01: remove one")
    check_names(list(names.values()), path)
    if things - set(names.values()):
        raise UserError(f"{path}: {min(things - set(names.values()))!r} under things is not under names: add it there")
    if not names or ignored & names.keys():
        trouble = f"id {min(ignored & names.keys())} is named and ignored" if names else "it names no class"
        raise UserError(f"{path}: {trouble}: expected {FORMAT}")
    if things and max(names) >= PER_CLASS:
        raise UserError(f"{path}: with things, ids must be below {PER_CLASS}, but {max(names)} is named: renumber it")
    return names, things, ignored


def number(value) -> int:
    """Take a pixel's number, which as a key of json is text."""
    wrong = f"{shown(value)} is no id"
    short = isinstance(value, str) and value.strip().isdecimal() and len(value) < 20
    found = int(value) if short else whole(value, wrong)
    if not 0 <= found < 1 << 31:
        raise ValueError(wrong)
    return found


def found_names(root: Path) -> tuple[dict[int, str], set[int], list[str]]:
    """Read every mask of all splits and name each id found after itself; unreadable masks are met again later.

    Returns
    -------
    names : dict of int to str
    ignored : set of int
    notes : list of str
        How 255 was understood, where that is not obvious.

    Raises
    ------
    UserError
        No mask could be read, the first one's reason; or numbers that look like softened edges, or too many.
    """
    folders = (
        [split_folders(root, split) for split in NAMES] if has_splits(root) else [(root / "images", root / "masks")]
    )
    counts, first = Counter(), None
    for _, _, mask in tqdm(
        [file for each in folders for file in pairs(each)],
        f"looking for ids ({CLASSES} would save this)", leave=False, disable=None,
    ):  # fmt: skip
        try:
            values, pixels, _ = distinct(read_ids(mask))
            counts.update(dict(zip(values.tolist(), pixels.tolist(), strict=True)))
        except DataError as error:
            first = first or error
    if not counts:
        reason = f" ({first})" if first else ""
        raise UserError(f"no mask under {root} could be read{reason}: expected masks/NAME.png for each images/NAME.jpg")
    between = [count for i, count in counts.items() if 0 < i < IGNORED]
    if len(between) >= SOFT and IGNORED in counts and 10 * sum(between) < counts[0] + counts[IGNORED]:
        raise UserError(
            f"the masks of {root} are 0 and 255 with {len(between)} grey levels between, as softened edges are: "
            f"save them without, or say in {CLASSES} what the numbers mean: {FORMAT}"
        )
    if len(counts) > MOST_FOUND:
        raise UserError(
            f"the masks of {root} hold {len(counts)} different numbers: say in {CLASSES} which are classes: {FORMAT}"
        )
    if counts.keys() == {0, IGNORED}:
        note = f"the masks hold 0 and 255 alone: 255 is taken for a class; to ignore it, write {CLASSES}: {FORMAT}"
        return {0: "class 0", IGNORED: "class 255"}, set(), [note]
    if counts.keys() == {IGNORED}:
        raise UserError(f"the masks of {root} hold nothing but 255, which is ignored: see {CLASSES}: {FORMAT}")
    notes = [f"255 in the masks is ignored; to name it, write {CLASSES}: {FORMAT}"] * (IGNORED in counts)
    return {i: f"class {i}" for i in sorted(counts) if i != IGNORED}, {IGNORED}, notes
