"""Write the tables of time and memory in benchmarks/README.md from the rows that were measured.

python -m benchmarks.table
"""

import sys
from pathlib import Path

from train.common.errors import Parser, UserError, run_command
from train.common.output_files import write_whole

from .cases import BACKWARD, SWIN, SWIN_MINI, SWIN_SEGMENTER
from .results import ROOT, find, read, targets

README = ROOT / "README.md"
BEGIN, END = "<!-- made by python -m benchmarks.table: begin -->", "<!-- made by python -m benchmarks.table: end -->"
NAMES = {"aff_mini": "AFF-Mini", "aff_tiny": "AFF-Tiny", "float32": "", "eager": ""}
MODEL = ("time, ms", "x Swin's", "x plain paths'", "memory, MiB", "x Swin's")
GEOMETRY = ("time, ms", "share of the forward pass")
OPERATOR = ("time, ms", "x plain paths'", "memory, MiB", "GFLOP/s", "of the FMA peak")
INTRODUCTION = """`make bench` runs the parity tests, then measures. Every row with device, versions and commit is in
[cpu.csv](cpu.csv) (those of a GPU will be in `gpu.csv`); these are some of them."""
PICTURE = "![images a second over image size](throughput.png)"  # where sizes were measured one image at a time
EXPLAINED = """Medians (least to most) of two visits, minutes apart. A ratio is the median of the ratios of pairs timed
in turn: AFF-Tiny against timm's Swin-Tiny, AFF-Mini against timm's Swin of AFF-Mini's own widths, depths and MLP ratio
(6.76 million parameters, as many as AFF-Mini), segmenters against transformers' Mask2Former with Swin-Tiny. Plain
paths: every token gathers its neighbourhood, and all pairs are compared. Memory: the greatest that a process of its own
had (on a GPU, its tensors), less what it had before the model was made. GFLOP/s: of attention's products alone
(`benchmarks/operators.py` counts them), beside what the same threads reach with multiply-adds on registers."""


def main(arguments):
    """Rewrite the README between its markers, or the file that is named."""
    parser = Parser("benchmarks.table", __doc__.splitlines()[0])
    parser.add_argument("readme", nargs="?", type=Path, default=README)
    target = parser.parse_args(arguments).readme
    text = target.read_text(encoding="utf-8")
    write_whole(target, replace_block(text, page(read(ROOT / "cpu.csv"), read(ROOT / "gpu.csv"))).encode())


def replace_block(text, block):
    """Return ``text`` with ``block`` between its markers.

    Raises
    ------
    UserError
        Not one marker of either kind, in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise UserError(f"the README needs one line {BEGIN} and one line {END} after it")
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def page(cpu, gpu):
    """Return the rows of a CPU and of a GPU as Markdown, or that there are none."""
    parts = [INTRODUCTION] if cpu or gpu else []
    if find([*cpu, *gpu], group="model", task="forward", batch=1):
        parts.append(PICTURE)
    for rows, kind, title in ((cpu, "cpu", "CPU"), (gpu, "cuda", "GPU")):
        if rows:
            parts += [f"## {title}", said_of(rows), wished(rows, kind), EXPLAINED, *tables(rows)]
        else:
            parts.append(f"No {title} figure has been measured yet.")
    return "\n\n".join(parts)


def said_of(rows):
    """Return where, with what and when the rows were measured, in words."""
    texts = []
    for name in ("device", "threads", "torch", "timm", "commit", "date"):
        values = list(dict.fromkeys(row[name] for row in rows))
        texts.append(f"{'' if name == 'device' else name + ' '}{' and '.join(values)}")
    return ", ".join(texts) + "."


def tables(rows):
    """Yield the tables of models, of segmenters, of geometry's share and of operators."""
    models = [row for row in find(rows, group="model", paths="fastest") if row["what"] not in (SWIN, SWIN_MINI)]
    yield table("model", MODEL, [[label(row), timed(row), *compared(row), *memory(row)] for row in models])
    segmenters = [row for row in find(rows, group="segmenter") if row["what"] != SWIN_SEGMENTER]
    lines = [[label(row), timed(row), compared(row)[0], *memory(row)] for row in segmenters]
    yield table("+ Mask2Former, 100 queries", (*MODEL[:2], *MODEL[3:]), lines)
    shares = find(rows, group="geometry")
    yield table("geometry of", GEOMETRY, [[label(row), timed(row), percent(row["share"])] for row in shares])
    operators = [
        row
        for row in find(rows, group="operator", paths="fastest")
        if row["task"] == BACKWARD or (row["what"], row["stage"]) == ("stage geometry", "2")
    ]
    lines = [[label(row), timed(row), compared(row)[1], memory(row)[0], *limit(row)] for row in operators]
    yield table("operator", OPERATOR, lines)


def table(head, columns, lines):
    """Return a Markdown table."""
    head = "| " + " | ".join([head, *columns]) + " |\n" + "|---" * (1 + len(columns)) + "|"
    return "\n".join([head, *("| " + " | ".join(line) + " |" for line in lines)])


def label(row):
    """Return a row's name in words."""
    parts = [NAMES.get(row["what"], row["what"]), row["task"], area(row), f"batch {row['batch']}"]
    parts += [f"stage {row['stage']}" if row["stage"] else "", *(NAMES.get(row[n], row[n]) for n in ("dtype", "mode"))]
    return ", ".join(part for part in parts if part)


def area(row):
    """Return the image size in words."""
    return row["size"].replace("x", " x ")


def compared(row):
    """Return a row's ratios of time: to Swin-Tiny and to the plain paths."""
    return [spread(row, name, f"{name}_min", f"{name}_max") for name in ("to_swin", "to_plain")]


def memory(row):
    """Return a row's memory and its ratio to Swin-Tiny's."""
    return [number(row["rise_mib"]), number(row["memory_to_swin"])]


def limit(row):
    """Return the GFLOP/s reached, and their share of what multiply-adds on registers alone reach."""
    if row["gflops"] == "":
        return ["", ""]
    return [number(row["gflops"]), percent(float(row["gflops"]) / float(row["peak_gflops"]))]


def percent(share):
    """Return a share in percent."""
    return f"{100 * float(share):.1f} %"


def timed(row):
    """Return a row's median time and its spread."""
    return spread(row, "median_ms", "min_ms", "max_ms")


def spread(row, middle, least, most):
    """Return a median and, in brackets, the least and the most."""
    if row[middle] == "":
        return ""
    return f"{number(row[middle])} ({number(row[least])} to {number(row[most])})"


def number(value):
    """Return a number to three digits, without an exponent."""
    return "" if value == "" else f"{float(f'{float(value):.3g}'):,.10g}"


def wished(rows, kind):
    """Return the list of targets as Markdown."""
    return "Targets:\n\n" + "\n".join(f"- {target}" for target in targets(rows, kind))


if __name__ == "__main__":
    sys.exit(run_command(main))
