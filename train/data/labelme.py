"""labelme's data: a json beside each picture, or anywhere under the folder, that outlines its objects.

Polygons, rectangles and circles are read; shapes with one label and one group_id are one object. A json under a folder
named train or val is of that split; where there is no such folder every tenth is for validation. Pictures without a
json are no part of the data.
"""

import json
import math
import os
from contextlib import suppress
from functools import partial
from pathlib import Path, PureWindowsPath

from ..common.errors import UserError, one_line
from .annotations import Annotation, Shape, ShapeSource, class_name, class_names
from .coco_json import parse_json, shown, side, text
from .coco_layouts import LOOKED_AT, NAMES
from .images import list_pictures, walk_files
from .mask_files import DataError
from .mask_folders import hold_out

MOST_JSON = 1 << 28  # bytes; a picture may be inside
CORNERS = (16, 360)  # least and most of the polygon that stands for a circle
KNOWN = "polygon, rectangle and circle"


def is_labelme(root: Path) -> bool:
    """Whether any of the first jsons under a folder is labelme's."""
    for path in list_jsons(root)[:LOOKED_AT] if root.is_dir() else ():
        with suppress(DataError):
            if isinstance(read_content(path).get("shapes"), list):
                return True
    return False


def list_jsons(root: Path) -> list[Path]:
    """List the jsons under a folder, but hidden ones and those in hidden folders."""
    files = (path for path in walk_files(root) if path.suffix.lower() == ".json")
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(root).parts)]


def split_of(path: Path, root: Path) -> str | None:
    """Return a json's split by the folders it is in."""
    for part in path.relative_to(root).parts[:-1]:
        for split, names in NAMES.items():
            if part.lower() in names:
                return split
    return None


def open_labelme(root: Path, split: str, task: str, images: Path | None = None) -> ShapeSource:
    """Open one split of a folder.

    Parameters
    ----------
    root : Path
    split : {"train", "val"}
    task : {"instance", "semantic"}
    images : Path, optional
        Folder of the pictures, where they are not where the jsons say.

    Raises
    ------
    UserError
        No jsons, or no object in them.
    """
    jsons, notes = list_jsons(root), []
    splits = {path: split_of(path, root) for path in jsons}
    if any(splits.values()):
        chosen, homeless = [path for path in jsons if splits[path] == split], list(splits.values()).count(None)
        if homeless:
            notes.append(f"{homeless} jsons of {root} are in no folder named train or val: left out")
    else:
        chosen = hold_out(jsons, split)
    if not chosen:
        raise UserError(f"no jsons of labelme for {split} in {root}: expected NAME.json beside each picture")
    read = partial(read_labelme, images=images)
    names = class_names(root, jsons, read)
    bare = {path.with_suffix("") for path in list_pictures(root)} - {path.with_suffix("") for path in jsons}
    if bare:
        notes.append(f"{len(bare)} pictures under {root} have no json beside them, such as {min(bare).name}")
    files = [(path.relative_to(root).with_suffix("").as_posix(), path) for path in chosen]
    return ShapeSource(files, read, names, root.resolve().name, task, notes)


def read_content(path: Path) -> dict:
    """Read a json that holds an object."""
    try:
        if os.path.isfile(path) and os.path.getsize(path) > MOST_JSON:
            raise UserError(f"{path} has more than {MOST_JSON:,} bytes: save it without its picture inside")
        content = parse_json(path, "labelme writes it")
    except UserError as error:
        raise DataError("unreadable annotation file", str(error)) from error
    return content if isinstance(content, dict) else {}


def read_labelme(path: Path, images: Path | None = None) -> Annotation:
    """Read one json.

    Raises
    ------
    DataError
        Missing, damaged, not labelme's, or with a shape that cannot be used.
    """
    content = read_content(path)
    if not isinstance(content.get("shapes"), list):
        message = f"{path} has no list 'shapes', so it is none of labelme's: remove it"
        raise DataError("annotation file of another kind", message)
    try:
        picture = find_picture(path, text(content.get("imagePath")), images)
    except ValueError as error:
        message = f"{path} has imagePath {shown(content.get('imagePath'))}: {one_line(error)}"
        raise DataError("broken annotation file", message) from error
    size = []
    for key in ("imageHeight", "imageWidth"):
        try:
            size.append(side(content.get(key)))
        except ValueError as error:
            message = f"{path} has {key} {shown(content.get(key))}: {one_line(error)}; save it anew with labelme"
            raise DataError("broken annotation file", message) from error
    return Annotation(picture, tuple(size), read_shapes(content["shapes"], path))


def find_picture(path: Path, named: str, images: Path | None) -> Path:
    """Find a json's picture: where it says, beside it, or in ``images``; where it says if it is nowhere."""
    plain = PureWindowsPath(named)  # which takes both kinds of slashes
    options = [path.parent / plain.as_posix(), path.parent / plain.name, *([images / plain.name] if images else [])]
    return next((option for option in options if os.path.isfile(option)), options[0])


def read_shapes(shapes: list, path: Path) -> list[Shape]:
    """Read a json's shapes, those of one label and group put together."""
    found = {}
    for number, shape in enumerate(shapes):
        place = f"shape {number}"
        try:
            if not isinstance(shape, dict):
                raise ValueError("it is no object of json")
            name, group = class_name(shape.get("label")), shape.get("group_id")
            place += f" ({shown(name)})"
            if group is not None and (isinstance(group, bool) or not isinstance(group, int | str)):
                raise ValueError(f"its group_id is {shown(group)}, not a whole number")
            outline = polygon(shape.get("shape_type") or "polygon", read_points(shape.get("points")))
        except ValueError as error:
            message = f"{path}: {place}: {one_line(error)}; correct or remove it"
            raise DataError("broken shape", message) from error
        key = (name, json.dumps(group)) if group is not None else number
        found.setdefault(key, (name, place, []))[2].append(outline)
    return [Shape(name, place, tuple(outlines)) for name, place, outlines in found.values()]


def read_points(points) -> list[tuple[float, float]]:
    """Take a list of points x, y."""
    pairs = points if isinstance(points, list) else [None]
    for pair in pairs:
        right = isinstance(pair, list) and len(pair) == 2
        if not right or not all(type(value) in (int, float) and abs(value) < 1e9 for value in pair):
            raise ValueError("its points are no list of x and y")
    return [(float(x), float(y)) for x, y in pairs]


def polygon(kind, points: list[tuple[float, float]]) -> list[float]:
    """Write a shape's outline as COCO does, x0, y0, x1, y1, ...

    Raises
    ------
    ValueError
        It has no inside, or another number of points than its kind has.
    """
    if kind == "rectangle" and len(points) == 2:
        (x0, y0), (x1, y1) = points
        points = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    elif kind == "circle":
        if len(points) != 2:
            raise ValueError(f"it is a circle with {len(points)} points, not its centre and one on its rim")
        points = circle(*points)
    elif kind not in ("polygon", "rectangle"):
        raise ValueError(f"it is a {shown(kind)}, and {KNOWN} are what is read")
    elif len(points) < 3 or (kind == "rectangle" and len(points) != 4):
        raise ValueError(f"it is a {kind} with {len(points)} points")
    return [value for point in points for value in point]


def circle(centre: tuple[float, float], rim: tuple[float, float]) -> list[tuple[float, float]]:
    """Return the corners of a regular polygon for a circle, about a pixel apart."""
    radius = math.dist(centre, rim)
    corners = min(max(math.ceil(2 * math.pi * radius), CORNERS[0]), CORNERS[1])
    turns = [2 * math.pi * k / corners for k in range(corners)]
    return [(centre[0] + radius * math.cos(turn), centre[1] + radius * math.sin(turn)) for turn in turns]
