"""Batches read ahead in worker processes, and the images that could not be read."""

import atexit
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from multiprocessing import active_children, get_all_start_methods, resource_tracker

from torch import Generator
from torch.utils.data import DataLoader

from ..common.errors import UserError
from ..config.section import Section
from .classification_dataset import Batch, ImageDataset


def load(samples: ImageDataset, sampler, config: Section, cuda: bool) -> Iterator[Batch]:
    """Read batches ahead in worker processes.

    Parameters
    ----------
    samples : ImageDataset
    sampler : EpochSampler, PassSampler or EvalSampler
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
        batch_sampler=sampler,
        num_workers=config.data.workers,
        collate_fn=samples.collate,
        worker_init_fn=leave_signals_to_parent,
        multiprocessing_context=method if config.data.workers else None,
        pin_memory=cuda,  # by the batch's own pin_memory
        generator=Generator(),  # its own, so that opening a loader draws nothing from the run's generator
    )
    with signals_blocked():
        batches = iter(loader)
    try:
        for batch in batches:
            if batch.images is None:
                raise unreadable(samples, batch)
            yield batch
    finally:
        del batches  # ends the loader processes now, not when a traceback that holds this frame goes


@atexit.register
def end_loaders() -> None:
    """Kill loader processes that are left when Python ends: they ignore SIGTERM, and it would wait for them forever."""
    for process in active_children():
        if process.daemon:
            process.kill()


def unreadable(samples: ImageDataset, batch: Batch) -> UserError:
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
    samples : ImageDataset
    """

    def __init__(self, samples: ImageDataset):
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
        """Describe which file was skipped and why, by reading it once more."""
        try:
            self.samples.read(index)
        except UserError as error:
            return str(error)
        return f"{self.samples.source.name(index)} could not be read, but now can"


def grouped(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Group ``size`` batches at a time, those of one step."""
    with closing(batches):
        while group := [batch for _, batch in zip(range(size), batches, strict=False)]:
            yield group
