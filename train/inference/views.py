"""Predictions for any picture: whole, in overlapping tiles, or from several views of it.

=========  =============================================  ==============================================
task       tiles (``evaluator.tile``)                         views (``evaluator.flip``, ``evaluator.scales``)
=========  =============================================  ==============================================
semantic   class scores averaged, near a tile's edge      class scores averaged, as Mask2Former does it
           with less weight
instance   masks joined where they agree                  all views' masks; of those of a class that
           (:mod:`train.inference.tile_joining`)            overlap (IoU of a half) the best one stays
panoptic   segments joined likewise                       refused: nobody has said what their mean is
=========  =============================================  ==============================================

Memory is bounded by the picture and a row of tiles: of a tile the network's output, at a quarter of the size, is held
until the rows it covers have got their labels; of its objects run lengths stay.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fast.postprocess import semantic

from ..common.errors import UserError
from ..config.segmentation import Config, Evaluator
from ..data.masks import decode, encode
from ..data.sample import Vocabulary
from ..data.segmentation_transforms import EvalTransform, Prepared
from . import segmentation as inference
from .predictions import Instance
from .segmentation import CELL, Enlarger, find_instances, find_segments, run_network
from .tile_grid import Tile, TileEnlarger, cut_picture
from .tile_joining import InstanceJoiner, PanopticJoiner, share_of_union, suppress


@dataclass(frozen=True)
class Shown:
    """What the network says of a tile: logits of classes (q, classes + 1) and of masks (q, h, w)."""

    tile: Tile
    classes: Tensor
    masks: Tensor
    enlarge: TileEnlarger


class View:
    """One view of a picture, tile by tile; the network sees each tile once, whatever the tasks.

    Parameters
    ----------
    model : Module
    prepared : Prepared
    size : tuple of int
        (H, W) of the original.
    tasks, vocabulary, rules, autocast
        As for ``predict``.
    """

    def __init__(
        self, model: nn.Module, prepared: Prepared, size, tasks, vocabulary: Vocabulary, rules: Evaluator, autocast
    ):
        self.model, self.prepared, self.rules, self.autocast = model, prepared, rules, autocast
        self.things, self.size = vocabulary.things, size
        self.instances = InstanceJoiner() if "instance" in tasks else None
        self.panoptic = PanopticJoiner(size) if "panoptic" in tasks else None
        self.tiles = cut_view(prepared, size, rules)
        self.waiting, self.shown = self.run(), []
        self.enlarge = Enlarger(tuple(-(-side // CELL) for side in prepared.size), prepared.size, size)

    def run(self) -> Iterator[list[Shown]]:
        """Return each row of tiles as the network sees it."""
        for row in self.tiles:
            yield [self.look(tile) for tile in row]

    def look(self, tile: Tile) -> Shown:
        """Show a tile to the network, and keep the outlines of what it finds."""
        image = self.prepared.image[:, tile.y.start : tile.y.rest, tile.x.start : tile.x.rest]
        classes, masks = run_network(self.model, image, self.autocast)
        enlarge = TileEnlarger(tuple(masks.shape[1:]), tile)
        if self.instances and all(tile.outer):
            self.instances.add(tile, find_instances(classes, masks, enlarge, self.things, self.rules.top))
        if self.panoptic and all(tile.outer):
            self.panoptic.add(tile, find_segments(classes, masks, enlarge, self.things, self.rules))
        return Shown(tile, classes, masks, enlarge)

    def finish(self) -> None:
        """Look at the tiles that are left."""
        self.shown = []
        for _ in self.waiting:
            pass

    def blend(self, first: int, last: int) -> Tensor:
        """Average the tiles' class scores in rows [first, last) of what the network sees; never go back up."""
        self.shown = [row for row in self.shown if row[0].tile.y.stop > first]
        while not self.shown or self.shown[-1][0].tile.y.stop < last:
            self.shown.append(next(self.waiting))
        total = weight = None
        for each in (each for row in self.shown for each in row):
            y, x = each.tile.y, each.tile.x
            start, stop = max(first, y.start), min(last, y.stop)
            if start >= stop:
                continue
            part = semantic(each.classes, each.enlarge.input_rows(each.masks, start - y.start, stop - y.start))
            if total is None:
                total = part.new_zeros(len(part), last - first, self.prepared.size[1])
                weight = part.new_zeros(total.shape[1:])
            share = torch.outer(*(side.weights(self.rules.shared) for side in (y, x)))
            share = share[start - y.start : stop - y.start].to(part)
            here = slice(start - first, stop - first), slice(x.start, x.stop)
            total[:, *here] += part * share
            weight[here] += share
        return total / weight

    def scores(self, first: int, last: int) -> Tensor:
        """Return the class scores (classes, n, W) in rows [first, last) of the original picture."""
        scores = self.enlarge.rows(self.blend, first, last)
        return scores.flip(-1) if self.prepared.flipped else scores

    def objects(self) -> list[Instance]:
        """List the objects found."""
        found = self.instances.result(self.size)
        if not self.prepared.flipped:
            return found
        return [Instance(each.label, each.score, encode(decode(each.rle)[:, ::-1])) for each in found]


def prepare_views(picture: np.ndarray, config: Config) -> list[Prepared]:
    """Prepare a picture (H, W, 3) uint8 at each of ``evaluator.scales``; with ``evaluator.flip`` mirrored, too."""
    transform = EvalTransform(config.data.test_short, config.data.test_longest)
    flips = (False, True) if config.evaluator.flip else (False,)
    return [transform(picture, scale, flipped) for scale in config.evaluator.scales for flipped in flips]


def cut_view(prepared: Prepared, size: tuple[int, int], rules: Evaluator) -> list[list[Tile]]:
    """Return the rows of tiles of a prepared picture whose original is (H, W)."""
    return cut_picture(prepared.size, size, rules.tile, rules.shared)


@torch.inference_mode()
def predict(model, views: list[Prepared], size: tuple[int, int], tasks, vocabulary, rules: Evaluator, autocast) -> dict:
    """Segment a picture.

    Parameters
    ----------
    views : list of Prepared
        Of ``augment.EvalTransform``: the picture, or the picture at several scales, mirrored or not.
    model, size, tasks, vocabulary, rules, autocast
        As for ``inference.predict``, which is what this is for one view in one tile.

    Returns
    -------
    dict
        A prediction for each task, as :mod:`train.inference.predictions` describes them.

    Raises
    ------
    UserError
        A tile, or without tiles a view, has more than ``MOST_INPUT`` pixels; panoptic from several views.
    """
    if len(views) == 1 and sum(map(len, cut_view(views[0], size, rules))) == 1:
        return inference.predict(model, views[0], size, tasks, vocabulary, rules, autocast)
    if len(views) > 1 and "panoptic" in tasks:
        raise UserError("several views (flip, scales) have no panoptic mean: ask for the task semantic or instance")
    looks = [View(model, view, size, tasks, vocabulary, rules, autocast) for view in views]
    found: dict = {}
    if "semantic" in tasks:
        found["semantic"] = label(looks, size)
    for look in looks:
        look.finish()
    if "instance" in tasks:
        objects = [each for look in looks for each in look.objects()]
        objects = objects if len(looks) == 1 else suppress(objects, share_of_union)
        found["instance"] = objects if rules.tile else objects[: rules.top]
    if "panoptic" in tasks:
        found["panoptic"] = looks[0].panoptic.result()
    return found


def label(looks: list[View], size: tuple[int, int]) -> np.ndarray:
    """Compute each pixel's class of the greatest mean score over the views: int64 (H, W)."""
    labels = np.zeros(size, dtype=np.int64)
    widest = max(size[1], *(look.prepared.size[1] for look in looks))
    first, step = 0, 1
    while first < size[0]:
        last = min(first + step, size[0])
        total = looks[0].scores(first, last)
        for look in looks[1:]:
            total += look.scores(first, last)
        labels[first:last] = total.argmax(dim=0).cpu().numpy()
        queries = max(row[0].masks.shape[0] for look in looks for row in look.shown)
        first, step = last, max(1, inference.AT_ONCE // ((queries + len(total)) * widest))
    return labels
