"""The rows that are measured, as a CSV file, and the targets that they are held against."""

import csv
import datetime
import io
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from train.common.errors import UserError
from train.common.output_files import Outputs, write_whole

ROOT = Path(__file__).parent
KEY = ("group", "what", "task", "stage", "size", "batch", "dtype", "mode", "paths")
TIMES = ("median_ms", "min_ms", "max_ms", "repeats")
MEMORY = ("peak_mib", "rise_mib", "memory_to_swin", "memory_to_plain")
RATIOS = tuple(f"to_{rival}{end}" for rival in ("swin", "plain") for end in ("", "_min", "_max"))
SOURCE = ("taken", "device", "threads", "torch", "timm", "commit", "date")
LIMIT = ("gflops", "peak_gflops")  # reached by attention, and by multiply-adds on registers alone
COLUMNS = (*KEY, *TIMES, *RATIOS, *MEMORY, *LIMIT, "share", *SOURCE)


def source(device):
    """Return where, with what and when rows were measured: the columns ``SOURCE`` without "taken"."""
    git = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    found = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": version("timm"),
        "commit": found.stdout.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def processor():
    """Return the name of the CPU."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def read(path):
    """Return the rows of a CSV file as dicts of text, none if there is no such file.

    Raises
    ------
    UserError
        A file of other columns.
    """
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise UserError(f"{path} is no table of benchmarks.run: name another file by --out")
    return rows


def write(path, rows):
    """Write rows (dicts of some of the COLUMNS) as a CSV file; numbers to four digits."""
    text = [{name: as_text(row.get(name, "")) for name in COLUMNS} for row in rows]
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(text)
    write_whole(path, file.getvalue().encode())


def check_free(path):
    """Refuse to write over a file of someone else; files of this folder are kept by git."""
    if path.parent.resolve() != ROOT.resolve():
        Outputs(path.parent).check([path.name])


def write_own(path, content):
    """Write bytes as a file, as ``check_free`` says."""
    if path.parent.resolve() == ROOT.resolve():
        write_whole(path, content)
    else:
        Outputs(path.parent).write(path.name, content)


def write_picture(path, figure):
    """Write a figure as PNG, as ``check_free`` says."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format="png")
    write_own(path, buffer.getvalue())


def as_text(value):
    """Return a value as the CSV file has it."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value)


def merge(old, new):
    """Return the old rows, those of the same key replaced by new ones, and the rest of the new ones after them."""
    fresh = {tuple(as_text(row[name]) for name in KEY): row for row in new}
    kept = [fresh.pop(tuple(row[name] for name in KEY), row) for row in old]
    return kept + list(fresh.values())


def find(rows, **wanted):
    """Return the rows whose columns read as wanted."""
    return [row for row in rows if all(as_text(row.get(name)) == as_text(v) for name, v in wanted.items())]


@dataclass(frozen=True)
class Target:
    """A figure to reach: ``value`` is None where nothing was measured."""

    what: str
    value: float | None
    limit: float
    unit: str = "x"

    def __str__(self):
        if self.value is None:
            return f"{self.what}: not measured (target: at most {self.limit:g} {self.unit})"
        verdict = "met" if self.value <= self.limit else "missed"
        return f"{self.what}: {self.value:.3g} {self.unit} (target: at most {self.limit:g} {self.unit}; {verdict})"


def targets(rows, device_type):
    """Return the targets of a device, "cpu" or "cuda", with what rows reached of them: a list of ``Target``."""
    return _gpu_targets(rows) if device_type == "cuda" else _cpu_targets(rows)


def _cpu_targets(rows):
    def against(group, what, task, size, limit):
        row = {"group": group, "what": what, "task": task, "size": size, "paths": "fastest"}
        row |= {"batch": 4} if group == "model" else {}
        names = {"model": "Swin of its size", "segmenter": "transformers' Mask2Former with Swin-Tiny"}
        what = f"{what}{' + Mask2Former' if group == 'segmenter' else ''}, {task}, {size}, against {names[group]}"
        return Target(what, _least(rows, "to_swin", **row), limit)

    mini = {"group": "geometry", "what": "aff_mini", "batch": 1, "size": "1024x2048", "task": "first call"}
    segmenter = _least(rows, "peak_mib", group="segmenter", what="aff_mini")
    return [
        against("model", "aff_tiny", "forward", "224x224", 1.1),
        against("model", "aff_tiny", "training step", "224x224", 1.15),
        against("model", "aff_mini", "forward", "224x224", 1.3),
        against("model", "aff_mini", "training step", "224x224", 1.3),
        against("segmenter", "aff_tiny", "forward", "512x512", 0.35),
        against("segmenter", "aff_tiny", "forward", "1024x2048", 0.35),
        against("segmenter", "aff_tiny", "training step", "256x256", 0.7),
        Target(
            "geometry in AFF-Mini's forward at 1024x2048, first call", _percent(_least(rows, "share", **mini)), 6, "%"
        ),
        Target("AFF-Mini + Mask2Former at 1024x2048, memory", segmenter and segmenter / 1024, 8, "GiB"),
    ]


def _gpu_targets(rows):
    tiny = {"group": "model", "what": "aff_tiny", "size": "224x224", "batch": 128, "dtype": "bfloat16"}
    attention = {"group": "operator", "what": "attention", "task": "forward + backward", "paths": "fastest"}
    found = []
    for task in ("forward", "training step"):
        compiled = [
            _least(rows, "to_swin", task=task, mode=mode, paths="fastest", **tiny) for mode in ("compiled", "captured")
        ]
        best = min((value for value in compiled if value is not None), default=None)
        found.append(Target(f"AFF-Tiny against Swin-Tiny, bfloat16, batch 128, {task}, compiled or captured", best, 1))
        memory = _least(rows, "memory_to_swin", task=task, paths="fastest", **tiny)
        found.append(Target(f"its memory against Swin-Tiny's, {task}, the least of the modes", memory, 1))
    for stage in (1, 2, 3, 4):
        ratio = _least(rows, "to_plain", stage=stage, **attention)
        found.append(
            Target(f"attention against gathering, bfloat16, batch 128, forward + backward, stage {stage}", ratio, 0.2)
        )
    return found


def _least(rows, column, **wanted):
    values = [float(row[column]) for row in find(rows, **wanted) if row.get(column) not in (None, "")]
    return min(values, default=None)


def _percent(share):
    return None if share is None else 100 * share
