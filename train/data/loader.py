"""Which images make which batch.

Epoch e's order is a function of (seed, e). Update t of the epoch takes images t T ... (t + 1) T - 1 of it, T being the
total batch; rank r takes the r-th part, in pieces of ``batch_size`` where gradients are accumulated. So the images of
an update depend neither on the number of processes nor on where a run was resumed.
"""

import atexit
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from multiprocessing import active_children, get_all_start_methods, resource_tracker

import numpy as np
from torch import Generator
from torch.utils.data import DataLoader

from ..common.distributed import Ranks
from ..common.errors import UserError
from ..config.loader import Section
from .classification import Batch, Samples


def accumulation(config: Section, ranks: Ranks) -> int:
    """Give the number of forward passes per update and rank: total batch / (batch size x ranks)."""
    total, each = config.run.total_batch, config.run.batch_size * ranks.size
    if total % each:
        raise UserError(
            f"run.total_batch {total} is no multiple of run.batch_size {config.run.batch_size} x {ranks.size} "
            f"processes: pass another --run.batch_size"
        )
    return total // each


def updates_per_epoch(samples: Samples, config: Section) -> int:
    """Give the number of whole batches an epoch has; what is left over waits for the next epoch's shuffle."""
    if len(samples) < config.run.total_batch:
        raise UserError(
            f"{len(samples)} training images are fewer than run.total_batch {config.run.total_batch}: "
            f"pass a smaller --run.total_batch and --run.batch_size"
        )
    return len(samples) // config.run.total_batch


class TrainKeys:
    """The keys (epoch, index) of this rank's batches, from update ``start`` of an epoch on.

    Parameters
    ----------
    samples : Samples
    config : Section
    ranks : Ranks
    epoch, start : int
    """

    def __init__(self, samples: Samples, config: Section, ranks: Ranks, epoch: int, start: int):
        total, pieces = config.run.total_batch, accumulation(config, ranks)
        order = samples.source.order(np.random.default_rng([config.run.seed, epoch]))
        updates = updates_per_epoch(samples, config)
        shares = order[: updates * total].reshape(updates, ranks.size, pieces, config.run.batch_size)
        self.epoch, self.batches = epoch, shares[start:, ranks.rank].reshape(-1, config.run.batch_size)

    def __len__(self):
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.batches:
            yield [(self.epoch, int(index)) for index in batch]


class EvalKeys:
    """This rank's part of a split, every image once over all ranks, none repeated to fill up."""

    def __init__(self, samples: Samples, batch_size: int, ranks: Ranks):
        self.mine, self.batch_size = np.arange(ranks.rank, len(samples), ranks.size), batch_size

    def __len__(self):
        return -(-len(self.mine) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for first in range(0, len(self.mine), self.batch_size):
            yield [(0, int(index)) for index in self.mine[first : first + self.batch_size]]


def load(samples: Samples, keys, config: Section, cuda: bool) -> Iterator[Batch]:
    """Read batches ahead in worker processes.

    Parameters
    ----------
    samples : Samples
    keys : TrainKeys or EvalKeys
    config : Section
    cuda : bool
        Whether batches go to a GPU, that is, are put in pinned memory.

    Yields
    ------
    Batch

    Raises
    ------
    UserError
        An image cannot be read and ``data.on_bad_image`` is "stop".
    """
    method = config.data.start_method
    if method and method not in get_all_start_methods():
        known = ", ".join(get_all_start_methods())
        raise UserError(f"data.start_method {method} is not to be had on this system: choose from {known}, or null")
    loader = DataLoader(
        samples,
        batch_sampler=keys,
        num_workers=config.data.workers,
        collate_fn=samples.collate,
        worker_init_fn=leave_signals_to_parent,
        multiprocessing_context=method if config.data.workers else None,
        generator=Generator(),  # its own, so that opening a loader draws nothing from the run's generator
    )
    with signals_blocked():
        batches = iter(loader)
    try:
        for batch in batches:
            if batch.images is None:
                raise unreadable(samples, batch)
            yield batch.pinned() if cuda else batch
    finally:
        del batches  # ends the loader processes now, not when a traceback that holds this frame goes


@atexit.register
def end_loaders() -> None:
    """Kill loader processes that are left when Python ends: they ignore SIGTERM, and it would wait for them forever."""
    for process in active_children():
        if process.daemon:
            process.kill()


def unreadable(samples: Samples, batch: Batch) -> UserError:
    """Name the image that stopped a batch."""
    for index in dict.fromkeys(batch.used):
        try:
            samples.read(index)
        except UserError as error:
            more = "and so are those after it" if samples.on_bad_image == "skip" else "or pass --data.on_bad_image skip"
            return UserError(f"{error}; replace or remove it, {more}")
    return UserError(f"an image of {samples.source.name(batch.used[0])} ... could not be read, but now can: try again")


@contextmanager
def signals_blocked():
    """Keep signals to the whole group from processes that are started meanwhile, also while they still import."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # started by another start method than fork, which would lift the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent(worker: int) -> None:
    """Ignore signals sent to the whole group: the main process finishes its step, and then closes its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class BadImages:
    """Names and counts the images that were skipped.

    Parameters
    ----------
    samples : Samples
    """

    def __init__(self, samples: Samples):
        self.samples, self.seen = samples, set()

    def note(self, batch: Batch) -> list[str]:
        """Take note of a batch and return a line for each unreadable image not met before."""
        lines = []
        for asked, used in zip(batch.asked, batch.used, strict=True):
            skipped = (used - asked) % len(self.samples)
            for index in ((asked + step) % len(self.samples) for step in range(skipped)):
                if index not in self.seen:
                    self.seen.add(index)
                    lines.append(f"skipped unreadable image ({len(self.seen)} so far): {self.reason(index)}")
        return lines

    def reason(self, index: int) -> str:
        """Say which file was skipped and why, by reading it once more."""
        try:
            self.samples.read(index)
        except UserError as error:
            return str(error)
        return f"{self.samples.source.name(index)} could not be read, but now can"


def grouped(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Put ``size`` batches at a time together, the pieces of one update."""
    with closing(batches):
        while pieces := [batch for _, batch in zip(range(size), batches, strict=False)]:
            yield pieces
