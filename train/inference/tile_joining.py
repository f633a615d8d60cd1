"""Objects and segments of overlapping tiles, joined to those of the whole picture.

Two masks of one class in neighbouring tiles are parts of one object if, within what the tiles share, they have at
least ``AGREE`` of the smaller one's pixels in common and one of them has no better partner (by intersection over union)
in the other tile. So an object may reach over any number of tiles. Masks are kept as run lengths.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as coco_mask
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fast.postprocess import Segment

from ..data.masks import area, decode, encode
from .predictions import Instance, Panoptic
from .tile_grid import Tile

AGREE = (
    0.5  # least share of the smaller mask's pixels, where tiles overlap, that two parts of one object have in common
)
SAME = 0.5  # share from which two masks of a class in one tile, or in two views of a picture, are one object


@dataclass(frozen=True)
class Part:
    """What a tile shows of an object: label, score, mask in run lengths of the tile."""

    tile: Tile
    label: int
    score: float
    rle: dict


def share_of_smaller(first: list[dict], second: list[dict]) -> np.ndarray:
    """Return the pixels that masks have in common as a share of the smaller one, (n, m) float64."""
    forth = coco_mask.iou(first, second, [1] * len(second))  # of the first's area
    return np.maximum(forth, coco_mask.iou(second, first, [1] * len(first)).T)


def share_of_union(first: list[dict], second: list[dict]) -> np.ndarray:
    """Return the masks' intersections over unions, (n, m) float64."""
    return coco_mask.iou(first, second, [0] * len(second))


def suppress(found: Iterable, share) -> list:
    """Keep objects (with label, score and rle) that share less than ``SAME`` with a better one of their class.

    Parameters
    ----------
    found : iterable of Instance or Part
    share : callable
        ``share_of_smaller`` or ``share_of_union``.

    Returns
    -------
    list
        Best first; none is empty.
    """
    ranked = sorted((each for each in found if area(each.rle)), key=lambda each: -each.score)
    kept = []
    for label in {each.label for each in ranked}:
        places = [i for i, each in enumerate(ranked) if each.label == label]
        outlines = [ranked[i].rle for i in places]
        close, chosen = share(outlines, outlines) >= SAME, []
        for i in range(len(places)):
            if not close[i, chosen].any():
                chosen.append(i)
        kept += [places[i] for i in chosen]
    return [ranked[i] for i in sorted(kept)]


def join(parts: list[Part]) -> np.ndarray:
    """Number the parts, those of one object alike, (n,) int, from 0."""
    places: dict = {}
    for number, part in enumerate(parts):
        places.setdefault(part.tile.place, []).append(number)
    pairs = [(0, 0)] if parts else []
    for (row, column), mine in places.items():
        for other in ((row, column + 1), (row + 1, column)):
            pairs += pair_up(parts, mine, places.get(other, []))
    first, second = np.array(pairs, dtype=int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(first)), (first, second)), shape=(len(parts), len(parts)))
    return connected_components(graph, directed=False)[1] if parts else first


def pair_up(parts: list[Part], mine: list[int], theirs: list[int]) -> list[tuple[int, int]]:
    """List the pairs of parts, of two tiles, that belong to one object."""
    labels = {parts[i].label for i in mine} & {parts[i].label for i in theirs}
    if not labels:
        return []
    tiles = [parts[numbers[0]].tile for numbers in (mine, theirs)]
    shared = [
        (max(first for first, _ in spans), min(last for _, last in spans))
        for spans in ([tile.y.seen for tile in tiles], [tile.x.seen for tile in tiles])
    ]
    pairs = []
    for label in sorted(labels):
        here, there = ([i for i in numbers if parts[i].label == label] for numbers in (mine, theirs))
        first, second = ([encode(window(parts[i], shared)) for i in numbers] for numbers in (here, there))
        alike = share_of_union(first, second)
        best = (alike == alike.max(axis=0)) | (alike == alike.max(axis=1, keepdims=True))
        agreed = np.argwhere(best & (share_of_smaller(first, second) >= AGREE)).tolist()
        pairs += [(here[i], there[j]) for i, j in agreed]
    return pairs


def window(part: Part, shared: list[tuple[int, int]]) -> np.ndarray:
    """Cut a part's mask to pixels (rows, columns) of the original picture."""
    rows, columns = (
        slice(first - side.seen[0], last - side.seen[0])
        for side, (first, last) in zip((part.tile.y, part.tile.x), shared, strict=True)
    )
    return decode(part.rle)[rows, columns]


def unite(parts: list[Part], size: tuple[int, int]) -> dict:
    """Join the masks of parts, in run lengths of the picture (H, W)."""
    boxes = []
    for part in parts:
        x, y, width, height = (int(side) for side in coco_mask.toBbox(part.rle))
        boxes.append((part.tile.y.seen[0] + y, part.tile.x.seen[0] + x, height, width))
    top, left = min(box[0] for box in boxes), min(box[1] for box in boxes)
    bottom, right = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
    whole = np.zeros((bottom - top, right - left), dtype=bool)
    for part, (y, x, height, width) in zip(parts, boxes, strict=True):
        inside = window(part, [(y, y + height), (x, x + width)])
        whole[y - top : y - top + height, x - left : x - left + width] |= inside
    return put(whole, top, left, size)


def put(mask: np.ndarray, top: int, left: int, size: tuple[int, int]) -> dict:
    """Write a mask (h, w) that lies somewhere in a picture (H, W) as the picture's run lengths, without its pixels."""
    height, width = mask.shape
    runs = np.zeros((width, height + 2), dtype=np.int8)
    runs[:, 1:-1] = mask.T
    column, start = np.nonzero(np.diff(runs, axis=1) == 1)
    _, stop = np.nonzero(np.diff(runs, axis=1) == -1)
    first = (left + column) * size[0] + top
    ends = np.stack([first + start, first + stop], axis=1).flatten()
    meeting = np.flatnonzero(ends[1:-1:2] == ends[2::2])  # a run to the bottom, and one from the top beside it
    ends = np.delete(ends, np.concatenate([2 * meeting + 1, 2 * meeting + 2]))
    counts = np.diff(ends, prepend=0, append=size[0] * size[1]).tolist()
    counts = counts if counts[-1] else counts[:-1]
    rle = coco_mask.frPyObjects({"size": list(size), "counts": counts}, *size)
    return {"size": list(size), "counts": rle["counts"].decode("ascii")}


class InstanceJoiner:
    """The objects of a picture, from its tiles."""

    def __init__(self):
        self.parts: list[Part] = []

    def add(self, tile: Tile, found: list[Instance]) -> None:
        """Take what a tile shows; of several masks for one object the best."""
        self.parts += suppress([Part(tile, each.label, each.score, each.rle) for each in found], share_of_smaller)

    def result(self, size: tuple[int, int]) -> list[Instance]:
        """List the picture's objects, best first; an object's score is that of its best part."""
        groups: dict = {}
        for part, number in zip(self.parts, join(self.parts).tolist(), strict=True):
            groups.setdefault(number, []).append(part)
        whole = [
            Instance(group[0].label, max(each.score for each in group), unite(group, size)) for group in groups.values()
        ]
        return sorted(whole, key=lambda each: -each.score)


class PanopticJoiner:
    """The segments of a picture (H, W), from its tiles: a pixel is the tile's whose core it is in, if that has any."""

    def __init__(self, size: tuple[int, int]):
        self.parts: list[Part] = []
        self.things: list[bool] = []
        self.map = np.zeros(size, dtype=np.int32)

    def add(self, tile: Tile, found: Panoptic) -> None:
        """Take what a tile shows."""
        numbers = np.zeros(max([0, *(each.id for each in found.segments)]) + 1, dtype=np.int32)
        for each in found.segments:
            self.parts.append(Part(tile, each.label, each.score, encode(found.map == each.id)))
            self.things.append(each.is_thing)
            numbers[each.id] = len(self.parts)
        shown, own = numbers[found.map], np.zeros(found.map.shape, dtype=bool)
        (top, left), (rows, columns) = (side.seen[0] for side in (tile.y, tile.x)), (tile.y.own, tile.x.own)
        own[rows[0] - top : rows[1] - top, columns[0] - left : columns[1] - left] = True
        here = self.map[slice(*tile.y.seen), slice(*tile.x.seen)]
        taken = (shown > 0) & (own | (here == 0))
        here[taken] = shown[taken]

    def result(self) -> Panoptic:
        """Return the picture's segments: things joined across tiles, of each other class one segment."""
        group_of = join(self.parts).tolist()
        names = [
            (number, True) if thing else (part.label, False)
            for part, number, thing in zip(self.parts, group_of, self.things, strict=True)
        ]
        present, places = np.unique(self.map), np.zeros(len(self.parts) + 1, dtype=np.int32)
        ids = {name: place for place, name in enumerate(dict.fromkeys(names[i - 1] for i in present.tolist() if i), 1)}
        best: dict = {}
        for number, (name, part) in enumerate(zip(names, self.parts, strict=True), 1):
            if name in ids:
                places[number] = ids[name]
                if name not in best or part.score > best[name].score:
                    best[name] = part
        segments = [Segment(ids[name], best[name].label, best[name].score, name[1]) for name in ids]
        return Panoptic(places[self.map], segments)
