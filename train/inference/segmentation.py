"""From a picture to predictions at its own size, with bounded memory.

Masks are enlarged a few at a time: the network's output at a quarter of the size is cut to the part that is no padding
and resized to the original, as Mask2Former does it. What is kept of each mask is its run lengths or, where pixels are
shared out, one map; classes' scores are added up a few rows at a time. So memory is bounded by the picture, however
many masks and classes there are. The rules are those of ``fast.postprocess``, which holds a picture's masks at once.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from fast.postprocess import Segment, resize_bilinear, semantic

from ..common.errors import UserError
from ..config.segmentation import Evaluator
from ..data.masks import encode
from ..data.sample import Vocabulary
from ..data.segmentation_transforms import Prepared
from .predictions import Instance, Panoptic

CELL = 4  # pixels of the network's input for one of its output
MOST_INPUT = 1 << 23  # pixels that the network sees at once; it takes about 1.3 kB for each
AT_ONCE = 1 << 23  # values of enlarged masks held at a time


class Enlarger:
    """Bring maps on the network's grid to the size of the original picture.

    Parameters
    ----------
    grid : tuple of int
        (h, w) of the network's output.
    inner : tuple of int
        Height and width of the network's input that is no padding.
    outer : tuple of int
        Height and width of the original picture.
    """

    def __init__(self, grid: tuple[int, int], inner: tuple[int, int], outer: tuple[int, int]):
        self.padded, self.inner, self.outer = (CELL * grid[0], CELL * grid[1]), inner, outer
        self.count = max(1, AT_ONCE // max(self.padded[0] * self.padded[1], outer[0] * outer[1]))

    def to_input(self, maps: Tensor) -> Tensor:
        """Enlarge maps (k, h, w) to the network's input and cut the padding off."""
        return resize_bilinear(maps, self.padded)[:, : self.inner[0], : self.inner[1]]

    def to_original(self, maps: Tensor) -> Tensor:
        """Resize maps of the input's size to the original's."""
        return maps if maps.shape[1:] == self.outer else resize_bilinear(maps, self.outer)

    def __call__(self, maps: Tensor) -> Tensor:
        """Enlarge maps (k, h, w) to the original's size (k, H, W)."""
        return self.to_original(self.to_input(maps))

    def input_rows(self, maps: Tensor, first: int, last: int) -> Tensor:
        """Return rows [first, last) of what ``to_input`` gives, to the last bit, from the rows of maps they need."""
        above, below = max(0, first // CELL - 1), min(maps.shape[1], (last - 1) // CELL + 2)
        part = resize_bilinear(maps[:, above:below], (CELL * (below - above), self.padded[1]))
        return part[:, first - CELL * above : last - CELL * above, : self.inner[1]]

    def rows(self, make: Callable[[int, int], Tensor], first: int, last: int) -> Tensor:
        """Return rows [first, last) of maps at the original's size; ``make`` gives rows of them at the input's size."""
        if self.inner == self.outer:
            return make(first, last)
        ratio = self.inner[0] / self.outer[0]
        place = ((torch.arange(first, last, dtype=torch.float64) + 0.5) * ratio - 0.5).clamp(0, self.inner[0] - 1)
        upper = place.long()
        lower = (upper + 1).clamp(max=self.inner[0] - 1)
        start, end = int(upper[0]), int(lower[-1]) + 1
        wide = make(start, end)
        return sample_rows(resize_bilinear(wide, (end - start, self.outer[1])), place - start)

    def parts(self, numbers: Tensor) -> Iterator[Tensor]:
        """Split numbers (n,) into as many at a time as may be enlarged together."""
        return iter(numbers.split(self.count)) if len(numbers) else iter(())


def sample_rows(maps: Tensor, places: Tensor) -> Tensor:
    """Interpolate maps (k, h, w) at rows (r,) float64 from 0 to h - 1, linearly: (k, r, w)."""
    upper = places.long()
    lower = (upper + 1).clamp(max=maps.shape[1] - 1)
    share = (places - upper).to(maps)[:, None]
    return torch.lerp(maps[:, upper.to(maps.device)], maps[:, lower.to(maps.device)], share)


@torch.inference_mode()
def run_network(model: nn.Module, image: Tensor, autocast) -> tuple[Tensor, Tensor]:
    """Return the logits of the classes (q, classes + 1) and of the masks (q, h, w), float32, of an image (3, H, W).

    Raises
    ------
    UserError
        The image has more than ``MOST_INPUT`` pixels.
    """
    height, width = image.shape[1:]
    if height * width > MOST_INPUT:
        raise UserError(
            f"the network would see {width:,} x {height:,} pixels at once, more than {MOST_INPUT:,}: "
            f"pass --evaluator.tile 1024 to cut pictures into tiles, or --data.test_short 1024 to scale them down"
        )
    with autocast:
        output = model(image[None].to(next(model.parameters()).device))
    return output.class_queries_logits[0].float(), output.masks_queries_logits[0].float()


@torch.inference_mode()
def predict(
    model: nn.Module,
    prepared: Prepared,
    size: tuple[int, int],
    tasks,
    vocabulary: Vocabulary,
    rules: Evaluator,
    autocast,
) -> dict:
    """Segment a picture that the network sees once and whole; ``tiles.predict`` is for all pictures.

    Parameters
    ----------
    model : Module
        A segmenter in evaluation mode.
    prepared : Prepared
        The picture as ``augment.EvalTransform`` makes it.
    size : tuple of int
        (H, W) of the original.
    tasks : iterable of str
        Of "semantic", "instance" and "panoptic".
    vocabulary : Vocabulary
    rules : Evaluator
        Thresholds.
    autocast : context manager
        In which the network runs.

    Returns
    -------
    dict
        A prediction for each task, as :mod:`train.inference.predictions` describes them.

    Raises
    ------
    UserError
        The picture has more than ``MOST_INPUT`` pixels as it is prepared.
    """
    classes, masks = run_network(model, prepared.image, autocast)
    enlarge = Enlarger(tuple(masks.shape[1:]), prepared.size, size)
    makers: dict[str, Callable] = {
        "semantic": lambda: semantic_labels(classes, masks, enlarge),
        "instance": lambda: find_instances(classes, masks, enlarge, vocabulary.things, rules.top),
        "panoptic": lambda: find_segments(classes, masks, enlarge, vocabulary.things, rules),
    }
    return {task: makers[task]() for task in tasks}


def semantic_labels(classes: Tensor, masks: Tensor, enlarge: Enlarger) -> np.ndarray:
    """Compute each pixel's best class: logits (q, classes + 1) and (q, h, w) -> int64 (H, W)."""
    labels = np.zeros(enlarge.outer, dtype=np.int64)
    widest = max(enlarge.padded[1], enlarge.outer[1])
    step = max(1, AT_ONCE // (sum(classes.shape) * widest))

    def make(first: int, last: int) -> Tensor:
        return semantic(classes, enlarge.input_rows(masks, first, last))

    for first in range(0, enlarge.outer[0], step):
        last = min(first + step, enlarge.outer[0])
        labels[first:last] = enlarge.rows(make, first, last).argmax(dim=0).cpu().numpy()
    return labels


def find_instances(classes: Tensor, masks: Tensor, enlarge: Enlarger, things, top: int) -> list[Instance]:
    """List the ``top`` best pairs of query and class that are countable, as ``fast.postprocess.instances`` has them."""
    prob = classes.softmax(dim=-1)[:, :-1]
    best = prob.flatten().argsort(descending=True, stable=True)[:top]
    best = best[[label in things for label in (best % prob.shape[1]).tolist()]]
    queries, labels, chances = best // prob.shape[1], best % prob.shape[1], prob.flatten()[best]
    outlines, inside = {}, {}
    for part in enlarge.parts(queries.unique()):
        logits = enlarge(masks[part])
        shapes = logits > 0
        sums = (logits.sigmoid() * shapes).sum(dim=(1, 2)) / (shapes.sum(dim=(1, 2)) + 1e-6)
        for query, share, shape in zip(part.tolist(), sums.tolist(), shapes.cpu().numpy(), strict=True):
            outlines[query], inside[query] = encode(shape), share
    listed = zip(queries.tolist(), labels.tolist(), chances.tolist(), strict=True)
    return [Instance(label, chance * inside[query], outlines[query]) for query, label, chance in listed]


def find_segments(classes: Tensor, masks: Tensor, enlarge: Enlarger, things, rules: Evaluator) -> Panoptic:
    """Assign each pixel to at most one segment, as ``fast.postprocess.panoptic`` does."""
    scores, labels = classes.softmax(dim=-1).max(dim=-1)
    kept = ((labels != classes.shape[1] - 1) & (scores > rules.object_threshold)).nonzero().flatten()
    owner, solid, areas = share_out(masks, scores, kept, enlarge)
    owned = torch.bincount(owner.flatten() + 1, minlength=len(kept) + 1)[1:]
    result = np.zeros(enlarge.outer, dtype=np.int32)
    owner, solid = owner.cpu().numpy(), solid.cpu().numpy()
    segments, stuff = [], {}
    for number, (query, area, left) in enumerate(zip(kept.tolist(), areas, owned.tolist(), strict=True)):
        mine = (owner == number) & solid
        if not mine.any() or left / area < rules.overlap_threshold:
            continue
        label = int(labels[query])
        if label not in stuff:
            segments.append(Segment(len(segments) + 1, label, float(scores[query]), label in things))
        place = stuff.get(label, len(segments))
        result[mine] = place
        if label not in things:
            stuff[label] = place
    return Panoptic(result, segments)


def share_out(masks: Tensor, scores: Tensor, kept: Tensor, enlarge: Enlarger) -> tuple[Tensor, Tensor, list[int]]:
    """Find the strongest query at each pixel.

    Parameters
    ----------
    masks : Tensor, shape (q, h, w)
        Logits.
    scores : Tensor, shape (q,)
        Class probabilities.
    kept : Tensor of int64, shape (r,)
        Queries that take part.
    enlarge : Enlarger

    Returns
    -------
    owner : Tensor of int64, shape (H, W)
        Place in ``kept`` of the query with the greatest score x mask probability; -1 if none takes part.
    solid : Tensor of bool, shape (H, W)
        Whether that query's mask probability is at least one half.
    areas : list of r int
        Pixels of each query's mask.
    """
    best = scores.new_full(enlarge.outer, -1.0)
    owner = torch.full(enlarge.outer, -1, dtype=torch.int64, device=scores.device)
    solid, areas = torch.zeros_like(owner, dtype=torch.bool), []
    for part in enlarge.parts(kept):
        for query, prob in zip(part, enlarge(masks[part]).sigmoid(), strict=True):
            whole, value = prob >= 0.5, scores[query] * prob
            better = value > best
            best, solid = torch.where(better, value, best), torch.where(better, whole, solid)
            owner = owner.masked_fill(better, len(areas))
            areas.append(int(whole.sum()))
    return owner, solid, areas
