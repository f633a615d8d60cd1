"""The focus ratio: does the network keep its tokens where the objects are?

Of all validation pictures together:

    (tokens kept in the objects' boxes / area of the boxes) / (tokens kept elsewhere / area elsewhere)

1 is what keeping tokens without looking gives. Areas are counted in the finest grid's cells, and a cell (or a token,
which sits on one) is inside a box if its centre is, so that keeping every cell gives exactly 1.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from ..config.segmentation import Evaluator
from ..data.digits import ScatteredDigits
from ..data.masks import box
from ..data.normalization import to_input
from ..data.segmentation_dataset import EvalDataset
from ..inference.segmentation import CELL
from ..inference.tokens import find_tile_tokens
from ..inference.views import cut_view


@dataclass
class Focus:
    """Counts of one merge over many pictures.

    Attributes
    ----------
    tokens, cells : list of int
        Kept tokens and cells of the finest grid, [inside, outside] the boxes.
    """

    tokens: list[int] = field(default_factory=lambda: [0, 0])
    cells: list[int] = field(default_factory=lambda: [0, 0])

    def add(self, kept: torch.Tensor, boxes, grid_size: tuple[int, int]) -> None:
        """Count one picture.

        Parameters
        ----------
        kept : Tensor of int64, shape (K, 2)
            (x, y) of the kept tokens in cells.
        boxes : tuple of int, or list of such
            One or several (x0, y0, x1, y1) in pixels, the last two exclusive.
        grid_size : tuple of int
            (h, w) of the finest grid.
        """
        every = torch.cartesian_prod(torch.arange(grid_size[1]), torch.arange(grid_size[0]))
        for counts, positions in ((self.tokens, kept), (self.cells, every)):
            inside = int(is_inside(positions, boxes).sum())
            counts[0] += inside
            counts[1] += len(positions) - inside

    @property
    def ratio(self) -> float:
        """Density of kept tokens inside the boxes over that outside; nan where nothing was kept or lies outside."""
        below = self.tokens[1] * self.cells[0]
        return self.tokens[0] * self.cells[1] / below if below else float("nan")


def is_inside(positions: torch.Tensor, boxes) -> torch.Tensor:
    """Return for each cell (n, 2) whether its centre is in a box, or in any of several, (n,) bool."""
    centres = (positions * CELL + CELL // 2)[:, None]
    boxes = torch.tensor(boxes).reshape(-1, 4)
    return ((centres >= boxes[:, :2]) & (centres < boxes[:, 2:])).all(2).any(1)


@torch.no_grad()
def measure_focus(run_stages: Callable, pictures: ScatteredDigits, count: int, batch_size: int = 64) -> list[Focus]:
    """Count where a network keeps its tokens.

    Parameters
    ----------
    run_stages : callable
        Images (B, 3, H, W) float32, on the CPU -> StageTokens of each stage.
    pictures : ScatteredDigits
    count : int
        How many pictures, from the first on.
    batch_size : int

    Returns
    -------
    list of Focus
        One for each of the three merges.
    """
    found = [Focus(), Focus(), Focus()]
    for first in range(0, count, batch_size):
        scenes = [pictures.scene(index) for index in range(first, min(first + batch_size, count))]
        stages = run_stages(torch.cat([to_input(scene.image) for scene in scenes]))
        for focus, stage in zip(found, stages, strict=False):
            for scene, kept in zip(scenes, stage.merged_positions, strict=True):
                height, width = scene.image.shape[:2]
                boxes = [digit.box for digit in scene.digits]
                focus.add(kept, boxes, (-(-height // CELL), -(-width // CELL)))
    return found


@dataclass(frozen=True)
class Kept:
    """Where a segmenter keeps its tokens in one validation picture, as it is evaluated: scaled, and in tiles.

    Attributes
    ----------
    boxes : ndarray of float, shape (g, 4)
        (x0, y0, x1, y1) of the objects that have pixels, in pixels that the network sees, the last two exclusive.
    areas : ndarray of int, shape (g,)
        The objects' pixels in the original picture.
    tokens : list of Tensor of int64, shape (K, 2)
        After each merge, (x, y) of the kept tokens in cells; where tiles overlap, those of the tile whose core it is.
    grid_size : tuple of int
        (h, w) of the finest grid.
    """

    boxes: np.ndarray
    areas: np.ndarray
    tokens: list[torch.Tensor]
    grid_size: tuple[int, int]


def find_kept(model: nn.Module, samples: EvalDataset, rules: Evaluator) -> Iterator[Kept]:
    """Find a segmenter's tokens in each validation picture; ``rules`` says which tiles there are."""
    for index in range(len(samples)):
        item = samples[0, index]
        prepared, sample = item.image, item.objects
        inner, outer = prepared.size, sample.ignore.shape
        tiles = cut_view(prepared, outer, rules)
        stages = find_tile_tokens(model, prepared.image, tiles)
        masks = [mask for mask in sample.masks if mask.any()]
        corners = np.array([box(mask) for mask in masks], dtype=np.float64).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        yield Kept(
            corners * np.array([inner[1] / outer[1], inner[0] / outer[0]] * 2),
            np.array([int(mask.sum()) for mask in masks]),
            [torch.from_numpy(stage["positions"]) for stage in stages[1:]],
            (-(-inner[0] // CELL), -(-inner[1] // CELL)),
        )


def measure_tile_focus(model: nn.Module, samples: EvalDataset, rules: Evaluator) -> list[Focus]:
    """Count where a segmenter keeps its tokens in all validation pictures: a Focus for each merge."""
    found = [Focus(), Focus(), Focus()]
    for kept in find_kept(model, samples, rules):
        for focus, tokens in zip(found, kept.tokens, strict=True):
            focus.add(tokens, kept.boxes, kept.grid_size)
    return found
