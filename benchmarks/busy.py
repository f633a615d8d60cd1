"""How much slower our models and Swin get beside busy processes, one a thread, and whether ours suffer more.

    GOMP_SPINCOUNT=100 python -m benchmarks.busy
    GOMP_SPINCOUNT=100 python -m benchmarks.busy --only "segmenter"

Idle and busy rounds alternate; a slow-down is the median of a round's busy times over that of its idle ones.
"""

import contextlib
import os
import statistics
import subprocess
import sys

import torch

from train.common.errors import Parser, run_command

from . import measure, run
from .cases import STEP, Case, Comparison
from .clock import seconds

ROUNDS, CALLS = 2, 3  # idle, then busy; calls of each model in each
SPIN = "while True: pass"
CASES = [
    *(Comparison(Case("model", name, *task), swin=True) for name in ("aff_mini", "aff_tiny") for task in ((), (STEP,))),
    Comparison(Case("segmenter", "aff_tiny", size=(512, 512), batch=1), swin=True),
]
HEAD = "| case | idle, ms | beside busy processes, ms | slow-down | Swin's slow-down |\n|---|---|---|---|---|"


def main(arguments):
    """Print a table, one line a case."""
    parser = Parser("benchmarks.busy", __doc__.splitlines()[0])
    parser.add_argument("--only", metavar="PATTERN", help="cases whose line matches this regular expression")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch; as many busy processes")
    options = parser.parse_args(arguments)
    chosen = run.choose(CASES, options.only)
    run.check_parity(run.tests_of(chosen))
    torch.set_num_threads(options.threads)
    policy = [f"{name}={os.environ[name]}" for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ]
    print(f"threads and busy processes: {options.threads}; waiting policy: {' '.join(policy) or 'none'}\n\n{HEAD}")
    for comparison in chosen:
        case, rival = comparison.case, comparison.rivals()["to_swin"]
        (idle, busy), (idle_swin, busy_swin) = measure_both([case, rival], options.threads)
        slower = f"{busy / idle:.2f} x | {busy_swin / idle_swin:.2f} x"
        print(f"| {case} | {1000 * idle:.4g} | {1000 * busy:.4g} | {slower} |", flush=True)


def measure_both(cases, processes):
    """Time cases in turn, idle and beside busy processes: a list of (idle, busy), median seconds of each."""
    device = torch.device("cpu")
    calls = [measure.prepare(case, device) for case in cases]
    times = [([], []) for _ in calls]
    for call in calls:
        call()
    for _ in range(ROUNDS):
        for place, count in enumerate((0, processes)):
            with busy_processes(count):
                for _ in range(CALLS):
                    for call, found in zip(calls, times, strict=True):
                        found[place].append(seconds(call, device))
    return [tuple(map(statistics.median, found)) for found in times]


@contextlib.contextmanager
def busy_processes(count):
    """Keep ``count`` processes busy inside the ``with`` block."""
    running = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(run_command(main))
