"""The cases that tests, benchmarks and notebooks share: token sets full of ties, under names that say what is odd.

Positions are integers of a grid, so nearly every distance occurs many times; a rule for ties that is missing shows.
"""

import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

import fast.neighborhoods
import reference.neighborhoods
from reference.patch_embedding import grid_positions

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
LOW = DTYPES[1:]  # where a float64 result can be the oracle, its own rounding not mattering


@dataclass(frozen=True)
class Case:
    """A batch of token sets, and the settings to use on it."""

    name: str
    grid_size: tuple  # (h, w)
    tokens: int | None = None  # n; None: all h w
    cluster_size: int = 8
    neighborhood: int = 24  # tokens
    batch: int = 1
    dim: int = 12  # C
    heads: int = 2
    shuffled: bool = False  # storage order: raster unless shuffled

    def __str__(self):
        return self.name

    @property
    def n(self):
        """Tokens of each image."""
        return self.grid_size[0] * self.grid_size[1] if self.tokens is None else self.tokens

    def generator(self, purpose=""):
        """Return a random generator that depends on the case's name and the purpose alone."""
        return np.random.default_rng(zlib.crc32(f"{self.name}/{purpose}".encode()))

    def positions(self):
        """Return (B, n, 2) int64: the coarse grid of spacing 4 first, then random cells, as after a merge."""
        rng, cells, images = self.generator("positions"), grid_positions(self.grid_size), []
        for _ in range(self.batch):
            on_coarse_grid = (cells % 4 == 0).all(axis=1)
            chosen = np.lexsort((rng.random(len(cells)), ~on_coarse_grid))[: self.n]
            images.append(cells[rng.permutation(chosen) if self.shuffled else np.sort(chosen)])
        return np.stack(images).astype(np.int64)

    def normal(self, purpose, *shape, dtype=torch.float64):
        """Return standard normal numbers (B, *shape), rounded to ``dtype``, as a tensor of it."""
        return torch.from_numpy(self.generator(purpose).standard_normal((self.batch, *shape))).to(dtype)

    def reference_geometry(self):
        """Return the reference's StageGeometry of each image."""
        return _reference_geometry(self)

    def fast_geometry(self, dtype=torch.float32, device="cpu"):
        """Return the fast twin's StageGeometry of the batch."""
        positions = torch.from_numpy(self.positions()).to(device)
        return fast.neighborhoods.stage_geometry(
            positions, self.cluster_size, self.neighborhood, self.grid_size, dtype=dtype
        )


@lru_cache(maxsize=64)
def _reference_geometry(case):
    return [
        reference.neighborhoods.stage_geometry(p, case.cluster_size, case.neighborhood, case.grid_size)
        for p in case.positions()
    ]


CASES = [
    Case("one_token", (8, 8), 1),
    Case("one_patch", (5, 4), 7),
    Case("two_patches", (4, 4), 9, neighborhood=8),
    Case("n_not_multiple_of_m", (9, 11)),
    Case("n_below_neighbourhood", (6, 6), neighborhood=48),
    Case("n_is_neighbourhood", (6, 8), neighborhood=48),
    Case("n_above_neighbourhood_by_one", (7, 7), neighborhood=48),
    Case("neighbourhood_below_m", (8, 8), neighborhood=3),
    Case("neighbourhood_half_to_even", (8, 12), neighborhood=20),
    Case("last_cluster_of_one", (5, 13), batch=3),
    Case("clusters_of_one", (5, 6), cluster_size=1, neighborhood=5),
    Case("non_square", (12, 20), neighborhood=48),
    Case("thin_row", (1, 40), neighborhood=16),
    Case("thin_column", (37, 2), cluster_size=5, neighborhood=15),
    Case("batch_of_3", (16, 16), 64, batch=3),
    Case("odd_channels", (10, 10), 45, cluster_size=7, neighborhood=21, dim=15, heads=3),
    Case("cluster_24", (24, 24), 300, cluster_size=24, neighborhood=144),
    Case("shuffled", (24, 33), 500, neighborhood=48, batch=2, shuffled=True),
    Case("quarter_of_56x56", (56, 56), 784, neighborhood=48),
    Case("full_56x56", (56, 56), neighborhood=48, dim=4, heads=1),
]
SMALL = [case for case in CASES if case.n <= 320]  # for what is slow or needs gradients
TINY = Case("tiny", (3, 4), 11, cluster_size=3, neighborhood=6, batch=2, dim=4, heads=2)  # for gradcheck


def case_named(name):
    """Return the case of that name."""
    return next(case for case in CASES if case.name == name)
