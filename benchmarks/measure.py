"""Taking turns, the speed of the processor itself, and the memory of a process of its own."""

import functools
import multiprocessing
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from fast.ops import dispatch, native

from . import models, operators
from .cases import STEP
from .clock import seconds

PLAIN = {operator: paths[-1] for operator, paths in dispatch.PATHS.items()}
LEAST_ROUNDS = 3
MIB = 2**20


@dataclass(frozen=True)
class Peak:
    """Memory of one case, MiB, and the time of its first call."""

    peak: float  # of the process; on a GPU of its tensors
    rise: float  # the same, less what the process had before the case was made
    seconds: float


@functools.cache
def fma_peak():
    """Measure what the processor reaches on registers alone, in FLOPs a second of float32: the best of 20 calls."""
    tasks, steps = 64, 20_000
    out, lanes = torch.empty(tasks), torch.empty(1, dtype=torch.int64)
    took = []
    for _ in range(20):
        start = time.perf_counter()
        native.call(str(Path(__file__).with_name("fma.cpp")), "multiply_add", out, lanes, tasks, steps)
        took.append(time.perf_counter() - start)
    return 2 * 12 * tasks * steps * lanes.item() / min(took)


def alternate(runs, rounds, budget, clock):
    """Time functions in turn, after one call of each that does not count.

    Parameters
    ----------
    runs : list of callables
    rounds : int
        At most; no more are begun, after the third, once ``budget`` is spent.
    budget : float
        Seconds.
    clock : callable
        Times one call: ``clock(run)``, seconds.

    Returns
    -------
    list of lists of float
        Each function's seconds, one a round.
    """
    for run in runs:
        clock(run)
    turns = []
    while len(turns) < rounds and (len(turns) < LEAST_ROUNDS or sum(map(sum, turns)) < budget):
        turns.append([clock(run) for run in runs])
    return [list(times) for times in zip(*turns, strict=True)]


def ratios(ours, theirs):
    """Return median, least and greatest of the ratios of times taken in the same round."""
    quotients = [a / b for a, b in zip(ours, theirs, strict=True)]
    return statistics.median(quotients), min(quotients), max(quotients)


def prepare(case, device):
    """Return a function that runs a case once, by the paths that the case wants."""
    paths = PLAIN if case.plain else {}
    with dispatch.force(**paths):
        run = (operators if case.group == "operator" else models).prepare(case, device)

    def call():
        with dispatch.force(**paths):
            run()

    return call


def memory(case, device, threads):
    """Run a case in a process of its own and return its ``Peak``; a training step runs twice, with AdamW's state."""
    return in_own_process(_peak_of, case, device, threads)


def in_own_process(function, *arguments):
    """Call a function of some module in a new process, where Python's libraries are loaded and nothing else was done.

    Not by ``subprocess``: on Linux a new program inherits the greatest memory of the one that started it.

    Raises
    ------
    RuntimeError
        The process ended early: killed for its memory, most likely.
    """
    on_linux = sys.platform == "linux"
    context = multiprocessing.get_context("forkserver" if on_linux else "spawn")
    if on_linux:
        context.set_forkserver_preload(["timm", "benchmarks.measure"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def _peak_of(case, device, threads):
    torch.set_num_threads(threads)
    before = 0 if device.type == "cuda" else resident_peak()
    run = prepare(case, device)
    took = seconds(run, device)
    if case.task == STEP:
        run()
    peak = torch.cuda.max_memory_allocated(device) / MIB if device.type == "cuda" else resident_peak()
    return Peak(peak, peak - before, took)


def resident_peak():
    """Return the greatest resident memory that this process has had, MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (MIB if sys.platform == "darwin" else 1024)
