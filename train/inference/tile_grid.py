"""Where the overlapping tiles of a large picture lie, and how maps on a tile come to the original picture's pixels."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .segmentation import CELL, Enlarger, sample_rows

EDGE = CELL // 2  # pixels at a tile's inner edges for which the network's output is not interpolated but held


@dataclass(frozen=True)
class Span:
    """One side of a tile, in pixels that the network sees.

    Attributes
    ----------
    start, stop : int
        Where it begins and ends; it begins at a whole cell.
    core : tuple of int
        The part up to the middle of what it shares with its neighbours; the cores of all spans fill the side once.
    inner, outer : int
        Length of the whole side, and the same in pixels of the original picture.
    """

    start: int
    stop: int
    core: tuple[int, int]
    inner: int
    outer: int

    @property
    def length(self) -> int:
        """Pixels that the network sees."""
        return self.stop - self.start

    @property
    def rest(self) -> int | None:
        """Where to cut the prepared picture: after the padding that a short side has, if this is the last span."""
        return None if self.stop == self.inner else self.stop

    def to_original(self, place: int) -> int:
        """Return the first pixel of the original whose centre is at or beyond a place."""
        return -((self.inner - 2 * place * self.outer) // (2 * self.inner))

    @property
    def seen(self) -> tuple[int, int]:
        """First and last (exclusive) pixel of the original that masks have; beyond, enlarging lacks the next cell."""
        first, last = self.start + (EDGE if self.start else 0), self.stop - (EDGE if self.stop < self.inner else 0)
        return self.to_original(first), self.to_original(last)

    @property
    def own(self) -> tuple[int, int]:
        """First and last (exclusive) pixel of the core in the original."""
        return self.to_original(self.core[0]), self.to_original(self.core[1])

    @property
    def places(self) -> Tensor:
        """Where the original's pixels that are seen lie on the span, from 0 to length - 1, float64."""
        pixels = torch.arange(*self.seen, dtype=torch.float64)
        return ((pixels + 0.5) * (self.inner / self.outer) - 0.5 - self.start).clamp(0, self.length - 1)

    def weights(self, overlap: int) -> Tensor:
        """Return each pixel's weight, float32: rising from both ends to 1 over as many pixels as neighbours share."""
        distance = torch.arange(1, self.length + 1)
        return (torch.minimum(distance, distance.flip(0)) / (overlap + 1)).clamp(max=1)


@dataclass(frozen=True)
class Tile:
    """A part of a picture: its place (row, column) among the tiles, and its two sides."""

    place: tuple[int, int]
    y: Span
    x: Span

    @property
    def outer(self) -> tuple[int, int]:
        """Height and width in pixels of the original."""
        return self.y.seen[1] - self.y.seen[0], self.x.seen[1] - self.x.seen[0]


def cut_side(inner: int, outer: int, tile: int | None, overlap: int) -> list[Span]:
    """Cut a side into spans of equal length, evenly spread.

    Parameters
    ----------
    inner, outer : int
        Length of the side as the network sees it, and in the original picture.
    tile : int or None
        Most pixels of a span; None: the whole side.
    overlap : int
        Least pixels that neighbours share, at most half of ``tile``.

    Returns
    -------
    list of Span
    """
    if not tile or inner <= tile:
        return [Span(0, inner, (0, inner), inner, outer)]
    gaps = math.ceil((inner - tile) / ((tile - overlap) // CELL * CELL))
    starts = [-(-i * (inner - tile) // (gaps * CELL)) * CELL for i in range(gaps + 1)]
    stops = [min(start + tile, inner) for start in starts]
    middles = [(start + stop) // (2 * CELL) * CELL for start, stop in zip(starts[1:], stops[:-1], strict=True)]
    cores = zip([0, *middles], [*middles, inner], strict=True)
    return [Span(*each, inner, outer) for each in zip(starts, stops, cores, strict=True)]


def cut_picture(inner: tuple[int, int], outer: tuple[int, int], tile: int | None, overlap: int) -> list[list[Tile]]:
    """Cut a picture of (height, width) into rows of tiles; arguments as for ``cut_side``."""
    ys, xs = (cut_side(*sides, tile, overlap) for sides in zip(inner, outer, strict=True))
    return [[Tile((i, j), y, x) for j, x in enumerate(xs)] for i, y in enumerate(ys)]


class TileEnlarger(Enlarger):
    """Bring maps on a tile's grid (h, w) to the pixels of the original picture that the tile shows."""

    def __init__(self, grid: tuple[int, int], tile: Tile):
        super().__init__(grid, (tile.y.length, tile.x.length), tile.outer)
        self.tile = tile

    def to_original(self, maps: Tensor) -> Tensor:
        """Interpolate maps of the tile's size at the original's pixels."""
        for side in (self.tile.y, self.tile.x):
            if side.inner == side.outer:
                maps = maps[:, side.seen[0] - side.start : side.seen[1] - side.start].mT
            else:
                maps = sample_rows(maps, side.places).mT
        return maps
