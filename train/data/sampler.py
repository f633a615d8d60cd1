"""Which images make which batch.

Epoch e's order is a function of (seed, e). Update t of the epoch takes images t T ... (t + 1) T - 1 of it, T being the
total batch; rank r takes the r-th part, in batches of ``batch_size`` where gradients are accumulated. So the images of
a step depend neither on the number of processes nor on where a run was resumed.

A segmenter's pictures come in passes, pass p's order being a function of (seed, p); step t of the run takes the
pictures t T ... (t + 1) T - 1 of all passes one after the other.
"""

from collections.abc import Iterator

import numpy as np

from ..common.distributed import Ranks
from ..common.errors import UserError
from ..config.section import Section
from ..config.segmentation import Config
from .classification_dataset import ImageDataset
from .segmentation_dataset import SegmentationDataset


def accumulation_steps(config: Section, ranks: Ranks) -> int:
    """Return the number of forward passes per step and rank: total batch / (batch size x ranks)."""
    total, each = config.run.total_batch, config.run.batch_size * ranks.size
    if total % each:
        raise UserError(
            f"run.total_batch {total} is no multiple of run.batch_size {config.run.batch_size} x {ranks.size} "
            f"processes: pass another --run.batch_size"
        )
    return total // each


def steps_per_epoch(samples: ImageDataset, config: Section) -> int:
    """Return the number of whole batches an epoch has; what is left over waits for the next epoch's shuffle."""
    if len(samples) < config.run.total_batch:
        raise UserError(
            f"{len(samples)} training images are fewer than run.total_batch {config.run.total_batch}: "
            f"pass a smaller --run.total_batch and --run.batch_size"
        )
    return len(samples) // config.run.total_batch


class EpochSampler:
    """The keys (epoch, index) of this rank's batches, from step ``start`` of an epoch on.

    Parameters
    ----------
    samples : ImageDataset
    config : Section
    ranks : Ranks
    epoch, start : int
    """

    def __init__(self, samples: ImageDataset, config: Section, ranks: Ranks, epoch: int, start: int):
        total, batches = config.run.total_batch, accumulation_steps(config, ranks)
        order = samples.source.order(np.random.default_rng([config.run.seed, epoch]))
        steps = steps_per_epoch(samples, config)
        shares = order[: steps * total].reshape(steps, ranks.size, batches, config.run.batch_size)
        self.epoch, self.batches = epoch, shares[start:, ranks.rank].reshape(-1, config.run.batch_size)

    def __len__(self):
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.batches:
            yield [(self.epoch, int(index)) for index in batch]


class EvalSampler:
    """This rank's part of a split, every image once over all ranks, none repeated to fill up."""

    def __init__(self, samples: ImageDataset, batch_size: int, ranks: Ranks):
        self.mine, self.batch_size = np.arange(ranks.rank, len(samples), ranks.size), batch_size

    def __len__(self):
        return -(-len(self.mine) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for first in range(0, len(self.mine), self.batch_size):
            yield [(0, int(index)) for index in self.mine[first : first + self.batch_size]]


class PassSampler:
    """The keys (pass, index) of this rank's batches, from one step of the run on.

    Parameters
    ----------
    samples : SegmentationDataset
    config : Config
    ranks : Ranks
    first, last : int
        Updates of the run, the latter exclusive.
    """

    def __init__(self, samples: SegmentationDataset, config: Config, ranks: Ranks, first: int, last: int):
        self.samples, self.config, self.ranks, self.steps = samples, config, ranks, range(first, last)
        self.accumulation, self.orders = accumulation_steps(config, ranks), {}

    def __len__(self):
        return len(self.steps) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        total, each = self.config.run.total_batch, self.config.run.batch_size
        for step in self.steps:
            mine = step * total + self.ranks.rank * self.accumulation * each
            for start in range(mine, mine + self.accumulation * each, each):
                yield [self.picture(place) for place in range(start, start + each)]

    def picture(self, place: int) -> tuple[int, int]:
        """Return the (pass, index) at a place of all passes one after the other."""
        number, within = divmod(place, len(self.samples))
        if number not in self.orders:
            generator = np.random.default_rng([self.config.run.seed, number])
            kept = {last: order for last, order in self.orders.items() if last == number - 1}
            self.orders = kept | {number: self.samples.source.order(generator)}
        return number, int(self.orders[number][within])
