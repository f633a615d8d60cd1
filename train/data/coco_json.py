"""COCO's json files read with care: every field that is used is looked at, and what is wrong is named in one line."""

import json
import os
from collections import Counter
from functools import lru_cache
from pathlib import Path

from PIL import ImageColor

from ..common.errors import UserError, one_line
from .images import MOST_PIXELS
from .sample import ClassInfo, Vocabulary

LISTS = ("images", "annotations", "categories")
FLAGS = {False: False, True: True, "0": False, "1": True, "false": False, "true": True}  # 0 and 1 equal the first two


def read_text(path: Path, what: str) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Raises
    ------
    UserError
        It is missing, no regular file, or not in UTF-8.
    """
    if not os.path.isfile(path):
        raise UserError(f"no file {path}: {what}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not in UTF-8 ({one_line(error)}): save it so") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error


def parse_json(path: Path, what: str):
    """Parse a json file; nesting too deep, and numbers too long, are refused as broken ones."""
    try:
        return json.loads(read_text(path, what))
    except UserError:
        raise
    except (ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{path} is not readable as json: {one_line(error)}") from error


def read_json(path: Path) -> dict:
    """Read a COCO file.

    Returns
    -------
    dict
        ``images`` (id, file_name, height, width), ``categories``, each with id and name, and ``annotations``, each with
        image_id; the other fields are as they are. Whole numbers written with a point are whole numbers.

    Raises
    ------
    UserError
        A list is missing, an entry lacks a field or has one of another type, an id is listed twice, or no image is.
    """
    content = parse_json(path, "unpack COCO's annotations there")
    for key in LISTS:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{path} has no list {key!r}: expected a COCO file with {', '.join(LISTS)}")
        for place, entry in enumerate(content[key]):
            if not isinstance(entry, dict):
                raise UserError(f"{path}: entry {place} of {key!r} is no object: complete or remove it")
    images = [read_image(entry, f"{path}: entry {i} of 'images'") for i, entry in enumerate(content["images"])]
    readers = {"id": class_number, "name": text}
    categories = [
        {**entry, **{key: field(entry, key, readers[key], f"{path}: entry {i} of 'categories'") for key in readers}}
        for i, entry in enumerate(content["categories"])
    ]
    if not images:
        raise UserError(f"{path} lists no images")
    for key, entries in (("images", images), ("categories", categories)):
        check_ids([entry["id"] for entry in entries], f"{path}: {key!r}")
    annotations = [
        {**entry, "image_id": field(entry, "image_id", identity, f"{path}: entry {i} of 'annotations'")}
        for i, entry in enumerate(content["annotations"])
    ]
    return {"images": images, "categories": categories, "annotations": annotations}


def read_image(entry: dict, place: str) -> dict:
    """Take what is needed of an image's entry."""
    readers = {"id": identity, "file_name": text, "height": side, "width": side}
    image = {key: field(entry, key, read, place) for key, read in readers.items()}
    if image["height"] * image["width"] > MOST_PIXELS:
        size = f"{image['width']:,} x {image['height']:,}"
        raise UserError(f"{place} has {size} pixels, more than {MOST_PIXELS:,}: cut it up")
    return image


def field(entry: dict, key: str, read, place: str):
    """Read one field of an entry, or say what it must be."""
    if key not in entry:
        raise UserError(f"{place} lacks {key!r}: complete or remove it")
    try:
        return read(entry[key])
    except ValueError as error:
        raise UserError(f"{place} has {key} {shown(entry[key])}: {one_line(error)}") from error


def shown(value) -> str:
    """Write a value as json does, cut off where it is long."""
    if isinstance(value, list | dict):
        inner = list(value.values()) if isinstance(value, dict) else value
        if len(inner) > 4 or any(isinstance(each, list | dict) for each in inner):
            return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a number of many digits"
    written = json.dumps(value)
    return written if len(written) <= 60 else f"{written[:57]}..."


def identity(value) -> int | str:
    """Take an id: a whole number, or text."""
    return text(value) if isinstance(value, str) else whole(value, "an id must be a whole number or text")


def class_number(value) -> int:
    """Take a category's id."""
    return whole(value, "a category's id must be a whole number, not in quotes")


def whole(value, message: str) -> int:
    """Take a whole number of at most 64 bits, also one written with a point."""
    right = isinstance(value, int | float) and not isinstance(value, bool) and -(2**63) <= value < 2**63
    if not right or value != int(value):
        raise ValueError(message)
    return int(value)


def side(value) -> int:
    """Take a picture's height or width."""
    message = "it must be a whole number of pixels, not in quotes"
    pixels = whole(value, message)
    if pixels < 1:
        raise ValueError(message)
    return pixels


def text(value) -> str:
    """Take a text that is not empty and can be printed in a line."""
    if not isinstance(value, str) or not value.strip() or any(c < " " or "\ud800" <= c < "\ue000" for c in value):
        raise ValueError("it must be text in quotes, and not empty")
    return value


def flag(value, missing: bool = False) -> bool:
    """Take a flag such as iscrowd: 0 or 1, also in quotes, false or true; null is a missing one."""
    if value is None:
        return missing
    if not isinstance(value, int | float | str) or value not in FLAGS:
        raise ValueError("it must be 0 or 1")
    return FLAGS[value]


def colour(value) -> tuple[int, int, int] | None:
    """Take a colour, a list of red, green and blue up to 255 or text such as "#ff6600"; None for anything else."""
    if isinstance(value, str):
        try:
            return ImageColor.getrgb(value)[:3]
        except ValueError:
            return None
    if not isinstance(value, list) or len(value) not in (3, 4):
        return None
    right = all(isinstance(part, int | float) and 0 <= part <= 255 for part in value)
    return tuple(int(part) for part in value[:3]) if right else None


def check_ids(ids: list, place: str) -> None:
    """Refuse ids of two types, and one that is there twice."""
    if len({type(each) for each in ids}) > 1:
        raise UserError(f"{place} have ids that are numbers and ids that are text: write all in one way")
    if len(set(ids)) < len(ids):
        seen, twice = set(), set()
        for each in ids:
            (twice if each in seen else seen).add(each)
        raise UserError(
            f"{place} list id {shown(min(twice))} more than once ({len(twice)} such ids): "
            f"if two files were put together, number one's entries anew"
        )


def other_type(value, known) -> str:
    """Return that an id is of another type than the known ones, as the tail of a sentence."""
    types = {type(each) for each in known}
    if not types or type(value) in types:
        return ""
    return (
        " (which is text, the ids are numbers)" if isinstance(value, str) else " (which is a number, the ids are text)"
    )


def read_vocabulary(categories: list[dict], name: str, path: Path) -> Vocabulary:
    """Create the classes of a file's categories, in the order of their ids; countable unless it says otherwise."""
    if not categories:
        raise UserError(f"{path} lists no categories")
    classes = []
    for each in sorted(categories, key=lambda category: category["id"]):
        place = f"{path}: category {shown(each['id'])}"
        thing = field({"isthing": None, **each}, "isthing", lambda value: flag(value, missing=True), place)
        classes.append(ClassInfo(each["name"], each["id"], thing, colour(each.get("color"))))
    check_names([each.name for each in classes], path)
    return Vocabulary(tuple(classes), name)


def check_names(names: list[str], path: Path) -> None:
    """Refuse two classes of one name."""
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise UserError(f"{path} has two classes named {twice!r}: rename one, or give both one id")


def task_of(path: Path) -> str:
    """Return whether a json's annotations are segments ("panoptic") or objects ("instance").

    Raises
    ------
    UserError
        It is no COCO file.
    """
    stat = os.stat(path) if os.path.isfile(path) else None
    return _task_of(path, stat and (stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=16)
def _task_of(path: Path, state) -> str:
    annotations = read_json(path)["annotations"]
    return "panoptic" if annotations and "segments_info" in annotations[0] else "instance"
