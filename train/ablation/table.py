"""The runs of ``train.ablate`` as a CSV file, one a line, and the Markdown table made of it."""

import csv
import io
import os
import platform
import statistics
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch
from scipy.stats import t as student

from ..common.errors import UserError, writing
from ..common.output_files import write_whole

SCORES = ("PQ", "PQ_things", "PQ_stuff", "AP", "AP50", "AP_small", "AP_medium", "AP_large", "mIoU")
FOCUS = ("focus_1", "focus_2", "focus_3")
NUMBERS = (*SCORES, "accuracy", *FOCUS, "minutes")
COLUMNS = ("row", "seed", *NUMBERS, "settings", "machine", "versions")
SHOWN = ("PQ", "PQ_stuff", "AP", "AP50", "AP_small", "AP_medium", "AP_large", "mIoU", "accuracy")
TITLE, READING = "# Ablations", "\n## Reading\n"
PACKAGES = ("torch", "numpy", "timm")


def describe_machine() -> dict:
    """Return where and with what a run was made: ``machine`` and ``versions``."""
    name = platform.processor() or platform.machine()
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        models = [line for line in facts.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    packages = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    threads = torch.get_num_threads()
    return {
        "machine": f"{name}, {os.cpu_count()} cores, {threads} thread{'s' * (threads > 1)}",
        "versions": f"Python {platform.python_version()}, {packages}",
    }


def read_runs(path: Path) -> dict[tuple[str, int], dict]:
    """Read finished runs.

    Parameters
    ----------
    path : Path
        Need not exist.

    Returns
    -------
    dict
        (row, seed) -> a dict of COLUMNS, numbers as float or None.

    Raises
    ------
    UserError
        Not a file of these columns, or a line that is not whole.
    """
    if not path.exists():
        return {}
    runs = {}
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise UserError(f"{path} is no table of train.ablate: name another file by --out")
        for run in reader:
            if None in run.values():
                raise UserError(f"{path}: line {reader.line_num} is not whole; delete it")
            try:
                run |= {name: float(run[name]) if run[name] else None for name in NUMBERS} | {"seed": int(run["seed"])}
            except (TypeError, ValueError) as error:
                raise UserError(f"{path}: line {reader.line_num} is damaged; delete it") from error
            runs[run["row"], run["seed"]] = run
    return runs


def append_run(path: Path, run: dict) -> None:
    """Add a run to the file as one whole line, so that several processes can add to it."""
    short = {name: f"{run[name]:.3f}" for name in NUMBERS if run[name] is not None}
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError), open(path, "x", encoding="utf-8") as file:
            file.write(as_line(COLUMNS))
        with open(path, "a", encoding="utf-8") as file:
            file.write(as_line([(run | short)[name] for name in COLUMNS]))
            file.flush()
            os.fsync(file.fileno())


def as_line(values) -> str:
    """Write values as a line of a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def write_table(path: Path, rows: list[str], head: str) -> None:
    """Write the Markdown table of a CSV file beside it; what stands under "## Reading" there is kept.

    Parameters
    ----------
    path : Path
        The CSV file.
    rows : list of str
        The order of the rows; the first is what the others are compared with.
    head : str
        How the runs were made.
    """
    runs, old = read_runs(path), read_page(path)
    groups = {name: {seed: run for (row, seed), run in runs.items() if row == name} for name in rows}
    groups = {name: group for name, group in groups.items() if group}
    reading = READING + old.partition(READING)[2] if READING in old else ""
    if groups:
        text = "\n".join(describe_runs(groups, rows[0], head)) + "\n" + reading
        write_whole(path.with_suffix(".md"), text.encode("utf-8", "surrogateescape"))


def read_page(path: Path) -> str:
    """Read the Markdown table beside a CSV file, "" if there is none.

    Raises
    ------
    UserError
        A file of that name which is no such table.
    """
    page = path.with_suffix(".md")
    old = page.read_text(encoding="utf-8", errors="surrogateescape") if page.exists() else ""
    if old and not old.startswith(f"{TITLE}\n"):
        raise UserError(f"{page} is no table of train.ablate and is not written over: name another file by --out")
    return old


def describe_runs(groups: dict, first: str, head: str) -> list[str]:
    """Write the page's lines: how the runs were made, the scores, the differences from the first row."""
    every = [run for group in groups.values() for run in group.values()]
    shown = [score for score in SHOWN if any(run[score] is not None for run in every)]
    minutes = [run["minutes"] for run in every]
    lines = [
        TITLE,
        "",
        head,
        f"{len(every)} runs of {min(minutes):.1f} to {max(minutes):.1f} minutes on {joined(every, 'machine')};",
        f"{joined(every, 'versions')}.",
        "",
        "Percent: mean over the seeds ± standard deviation (least to most). Focus: tokens kept per area, in objects'",
        "boxes over outside, after merge 1 / 2 / 3, mean over the seeds; keeping tokens blindly gives 1.",
        "",
        "| row | seeds | " + " | ".join(shown) + " | focus |",
        "|---|---|" + "---|" * (len(shown) + 1),
    ]
    for name, group in groups.items():
        cells = [spread([run[score] for run in group.values()]) for score in shown]
        focus = " / ".join(f"{mean_of([run[merge] for run in group.values()]):.2f}" for merge in FOCUS)
        lines.append(f"| {name} | {len(group)} | {' | '.join(cells)} | {focus} |")
    return lines + (describe_differences(groups, first, shown) if first in groups and len(groups) > 1 else [])


def describe_differences(groups: dict, first: str, shown: list[str]) -> list[str]:
    """Write a table of each row less the first one, seed by seed."""
    lines = [
        "",
        f"Each row less {first} of the same seed (same pictures, same starting weights): mean over the seeds, and in",
        "brackets the 95 % confidence interval of the mean (Student's t).",
        "",
        "| row | seeds | " + " | ".join(shown) + " |",
        "|---|---|" + "---|" * len(shown),
    ]
    for name, group in groups.items():
        pairs = [(run, groups[first][seed]) for seed, run in group.items() if seed in groups[first]]
        if name == first or not pairs:
            continue
        cells = [interval([difference(a[score], b[score]) for a, b in pairs]) for score in shown]
        lines.append(f"| {name} | {len(pairs)} | {' | '.join(cells)} |")
    return lines


def difference(a: float | None, b: float | None) -> float | None:
    """Subtract, unless one is missing."""
    return None if a is None or b is None else a - b


def spread(values: list[float | None]) -> str:
    """Write mean ± standard deviation (least to most) of the values that there are, or a dash."""

    def around(mean: float, deviation: float, known: list[float]) -> str:
        return f" ± {deviation:.1f} ({min(known):.1f} to {max(known):.1f})"

    return written(values, ".1f", around)


def margin(values: list[float]) -> float:
    """Half the width of the 95 % confidence interval (Student's t) of the mean of at least two values."""
    return float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def interval(values: list[float | None]) -> str:
    """Write mean and 95 % confidence interval (Student's t) of the values that there are, or a dash."""

    def between(mean: float, _: float, known: list[float]) -> str:
        half = margin(known)
        return f" ({mean - half:+.1f} to {mean + half:+.1f})"

    return written(values, "+.1f", between)


def written(values: list[float | None], form: str, more: Callable[[float, float, list[float]], str]) -> str:
    """Write the mean of the values that there are, and of two or more what ``more`` makes of mean and deviation."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = statistics.mean(known)
    return f"{mean:{form}}" + (more(mean, statistics.stdev(known), known) if len(known) > 1 else "")


def mean_of(values: list[float | None]) -> float:
    """Average the values that there are; nan where there is none."""
    values = [value for value in values if value is not None]
    return statistics.mean(values) if values else float("nan")


def joined(runs: list[dict], column: str) -> str:
    """List the different entries of a column."""
    return "; ".join(sorted({run[column] for run in runs}))
