"""Check parity, then measure time and memory, and hold them against the targets.

    python -m benchmarks.run                       # make bench
    python -m benchmarks.run --only "aff_tiny.*step"
    python -m benchmarks.run --quick               # seconds: does it run?

Times of ours and of what they are compared with alternate in one process; a ratio is the median of the ratios of pairs.
Everything is visited VISITS times, the second time when all has been seen once, minutes later.
Memory is that of a process of its own. Rows go to benchmarks/cpu.csv or gpu.csv, unless --quick.
"""

import re
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from fast.ops import dispatch
from train.common.errors import Parser, UserError, run_command

from . import measure, models, operators, results
from .cases import SWIN, SWIN_MINI, SWIN_SEGMENTER, comparisons
from .clock import seconds

TESTS = Path(__file__).parent.parent / "parity_tests"
GOLDEN = "test_golden.py"
PARITY = {  # what is measured: the tests that must pass before
    "model": (GOLDEN,),
    "geometry": (GOLDEN, "test_neighborhoods.py", "test_grid_prior.py"),
    "segmenter": (GOLDEN, "test_golden_segmentation.py"),
    "nearest clusters": ("test_neighborhoods.py",),
    "nearest tokens": ("test_neighborhoods.py",),
    "local stride": ("test_grid_prior.py",),
    "stage geometry": ("test_neighborhoods.py",),
    "attention": ("test_attention.py",),
    "merging": ("test_merging.py",),
    "deformable reading": ("test_deformable.py",),
}
QUICK = (GOLDEN, "-k", "fast_geometry")
PACE = {"cpu": (9, 8.0), "cuda": (30, 5.0)}  # rounds, and seconds after which no more are begun
FEW = 0.15  # of these seconds for an operator
VISITS = 2  # of each case, minutes apart


def main(arguments):
    """Run the command line; returns 1 where a case could not be measured."""
    options = parse(arguments)
    device = device_named(options.device)
    torch.set_num_threads(options.threads)
    chosen = choose(comparisons(device.type, options.quick), options.only)
    out = options.out or (None if options.quick else results.ROOT / ("gpu.csv" if device.type == "cuda" else "cpu.csv"))
    old = results.read(out) if out else []  # also refuses a file of someone else
    old = old if options.only else []
    check_parity(QUICK if options.quick else tests_of(chosen))
    bench = Bench(device, options.threads, *((3, 1.0) if options.quick else PACE[device.type]))
    print(", ".join(f"{name} {value}" for name, value in bench.source.items()), flush=True)
    started = time.perf_counter()
    for comparison in chosen * (1 if options.quick else VISITS):
        bench.measure(comparison)
        if out:
            results.write(out, results.merge(old, bench.rows))
    print(f"\n{len(bench.rows)} rows in {(time.perf_counter() - started) / 60:.1f} minutes\n")
    if not options.quick:
        print("\n".join(map(str, results.targets(results.merge(old, bench.rows), device.type))))
    return int(bench.failed)


def parse(arguments):
    """Read the command line."""
    parser = Parser("benchmarks.run", __doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few tiny cases; nothing is written without --out")
    parser.add_argument("--only", metavar="PATTERN", help="cases whose line matches this regular expression")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the CSV file; with --only, its other rows are kept")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        raise UserError(f"--threads must be at least 1, not {options.threads}")
    return options


def device_named(name):
    """Return a device that is there."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type not in PACE:
        raise UserError(f"--device {name}: only cpu and cuda are timed")
    return device


def choose(candidates, pattern):
    """Return the comparisons whose case matches a pattern, all without one."""
    try:
        found = [c for c in candidates if re.search(pattern or "", str(c.case))]
    except re.error as error:
        raise UserError(f"--only {pattern!r} is no regular expression: {error}") from error
    if not found:
        lines = "; ".join(str(c.case) for c in candidates[:3])
        raise UserError(f"--only {pattern!r} matches none of {len(candidates)} cases, such as {lines}")
    return found


def tests_of(chosen):
    """Return the test files that the chosen comparisons rest on."""
    kinds = [c.case.what if c.case.group == "operator" else c.case.group for c in chosen]
    return tuple(dict.fromkeys(test for kind in kinds for test in PARITY[kind]))


def check_parity(tests):
    """Run tests, and let nothing be measured if one fails.

    Raises
    ------
    UserError
        After printing what failed.
    """
    names = [str(TESTS / test) if test.endswith(".py") else test for test in tests]
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *names]
    print(f"parity first: {' '.join(tests)}", file=sys.stderr, flush=True)
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-3000:], file=sys.stderr)
        raise UserError(f"parity tests fail, so nothing was timed: python -m pytest {' '.join(tests)}")


class Bench:
    """Measure comparisons on a device and gather ``rows``; ``failed`` once something could not be measured."""

    def __init__(self, device, threads, rounds, budget):
        self.device, self.threads, self.rounds, self.budget = device, threads, rounds, budget
        self.source, self.rows, self.failed = results.source(device), [], False
        self.passes = {}  # case: what geometry took in the passes of all visits
        self.turns = {}  # (case, rival or None): seconds of ours, and of the rival, of all visits

    def measure(self, comparison):
        """Measure a case and its rivals, and print a line each; what fails is named, and the rest goes on."""
        kinds = {"geometry": self._geometry}
        try:
            kinds.get(comparison.case.group, self._compare)(comparison)
        except RuntimeError as error:
            self._complain(comparison.case, error)

    def _compare(self, comparison):
        case, rivals = comparison.case, comparison.rivals()
        if not operators.has_plain_rival(case, self.device):
            rivals.pop("to_plain", None)
        run, peak = measure.prepare(case, self.device), self._memory(case)
        columns, others, times = {}, [], None
        for name, rival in rivals.items():
            try:
                turn = self._alternate([run, measure.prepare(rival, self.device)], case)
                ours, theirs = self._all_visits((case, rival), turn)
                other = self._memory(rival)
            except RuntimeError as error:
                self._complain(rival, error)
                continue
            times = times or ours
            columns |= dict(zip((name, f"{name}_min", f"{name}_max"), measure.ratios(ours, theirs), strict=True))
            columns[f"memory_{name}"] = peak.rise / other.rise if other.rise else None
            others.append((rival, theirs, other))
        times = times or self._all_visits((case, None), self._alternate([run], case))[0]
        self._add(case, times, peak, **columns)
        for rival, theirs, other in others:
            self._add(rival, theirs, other)

    def _alternate(self, runs, case):
        budget = self.budget * (FEW if case.group == "operator" else 1)
        return measure.alternate(runs, self.rounds, budget, partial(seconds, device=self.device))

    def _all_visits(self, key, turn):
        """Add what was timed to what earlier visits timed, and return both together."""
        self.turns[key] = [a + b for a, b in zip(self.turns.get(key, [[]] * len(turn)), turn, strict=True)]
        return self.turns[key]

    def _memory(self, case):
        return measure.memory(case, self.device, self.threads)

    def _geometry(self, comparison):
        case = comparison.case
        passes = [models.geometry_share(case, self.device) for _ in range(1 + measure.LEAST_ROUNDS)][1:]
        passes = self.passes[case] = self.passes.get(case, []) + passes
        for task, calls in zip(("first call", "next call"), zip(*passes, strict=True), strict=True):
            share = statistics.median(part / whole for part, whole in calls)
            self._add(replace(case, task=task), [part for part, _ in calls], None, share=share)

    def _add(self, case, times, peak, **columns):
        """Keep a row and print it."""
        milliseconds = sorted(1000 * t for t in times)
        row = {name: getattr(case, name) for name in results.KEY if hasattr(case, name)}
        row |= {"size": f"{case.size[0]}x{case.size[1]}", "paths": "plain" if case.plain else "fastest"}
        row |= {"median_ms": statistics.median(milliseconds), "min_ms": milliseconds[0], "max_ms": milliseconds[-1]}
        row |= {"repeats": len(times), **columns, "taken": taken(case, self.device), **self.source}
        row |= {"peak_mib": peak.peak, "rise_mib": peak.rise} if peak else {}
        if case.what == "attention" and self.device.type == "cpu":
            reached = operators.attention_flops(case) / statistics.median(times)
            row |= {"gflops": reached / 1e9, "peak_gflops": measure.fma_peak() / 1e9}
        key = [row.get(name) for name in results.KEY]
        self.rows = [old for old in self.rows if [old.get(name) for name in results.KEY] != key] + [row]
        print(f"{case}: {describe(row)}", flush=True)

    def _complain(self, case, error):
        self.failed = True
        lines = str(error).strip().splitlines() or ["no message"]
        print(f"not measured: {case}: {type(error).__name__}: {lines[0]}", file=sys.stderr, flush=True)


def taken(case, device):
    """Return which path each operator took, as text; empty for rivals."""
    if case.what in (SWIN, SWIN_MINI, SWIN_SEGMENTER):
        return ""
    with dispatch.force(**measure.PLAIN if case.plain else {}):
        return " ".join(f"{operator}={dispatch.path(operator, device)}" for operator in dispatch.PATHS)


def describe(row):
    """Return what was measured of a row, on one line."""
    parts = [f"{row['median_ms']:.4g} ms ({row['min_ms']:.4g} to {row['max_ms']:.4g}, {row['repeats']} x)"]
    for name, rival in (("to_swin", "Swin's"), ("to_plain", "plain paths")):
        if name in row:
            parts.append(f"{row[name]:.3g} x {rival} ({row[name + '_min']:.3g} to {row[name + '_max']:.3g})")
    if "peak_mib" in row:
        parts.append(f"peak {row['peak_mib']:.0f} MiB, {row['rise_mib']:.0f} of them the case's own")
    if row.get("memory_to_swin") is not None:
        parts.append(f"{row['memory_to_swin']:.2f} x Swin's")
    if "gflops" in row:
        share = row["gflops"] / row["peak_gflops"]
        parts.append(f"{row['gflops']:.0f} GFLOP/s, {100 * share:.0f} % of what registers alone allow")
    if "share" in row:
        parts.append(f"{100 * row['share']:.1f} % of the pass")
    return "; ".join(parts)


if __name__ == "__main__":
    sys.exit(run_command(main))
