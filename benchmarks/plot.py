"""Draw throughput over image area, one image at a time, from the rows that were measured: benchmarks/throughput.png.

python -m benchmarks.plot
"""

import sys
from pathlib import Path

import matplotlib.figure
import matplotlib.ticker

from train.common.errors import Parser, UserError, run_command

from .cases import SWIN, SWIN_MINI
from .results import ROOT, find, read, write_picture

SERIES = (  # model, paths, label, colour (Okabe and Ito), marker, line
    ("aff_mini", "fastest", "AFF-Mini", "#0072B2", "o", "-"),
    ("aff_mini", "plain", "AFF-Mini, plain paths", "#0072B2", "s", ":"),
    ("aff_tiny", "fastest", "AFF-Tiny", "#009E73", "D", "-"),
    ("aff_tiny", "plain", "AFF-Tiny, plain paths", "#009E73", "v", ":"),
    (SWIN, "fastest", "Swin-Tiny (timm)", "#D55E00", "^", "--"),
    (SWIN_MINI, "fastest", "Swin of AFF-Mini's widths", "#CC79A7", "x", "--"),
)


def main(arguments):
    """Draw the rows of cpu.csv and, where there is one, of gpu.csv."""
    parser = Parser("benchmarks.plot", __doc__.splitlines()[0])
    parser.add_argument("picture", nargs="?", type=Path, default=ROOT / "throughput.png")
    target = parser.parse_args(arguments).picture
    tables = [read(ROOT / name) for name in ("cpu.csv", "gpu.csv")]
    if not any(tables):
        raise UserError("nothing was measured yet: run python -m benchmarks.run first")
    write_picture(target, draw([rows for rows in tables if rows]))


def draw(tables):
    """Return a figure with one log-log plot for each list of rows: images a second over pixels; bars are the spread."""
    figure = matplotlib.figure.Figure(figsize=(1 + 5.5 * len(tables), 4.2), layout="constrained")
    for axes, rows in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables, strict=True):
        for what, paths, label, colour, marker, line in SERIES:
            found = throughput(rows, what, paths)
            if len(found) > 1:
                area, middle, *bars = zip(*found, strict=True)
                axes.errorbar(area, middle, bars, label=label, color=colour, marker=marker, linestyle=line, capsize=3)
        decorate(axes, rows)
    return figure


def throughput(rows, what, paths):
    """Return (pixels, images a second, bar below, bar above) of each size, smallest first."""
    found = {}
    for row in find(rows, group="model", what=what, task="forward", batch=1, mode="eager", paths=paths):
        height, width = map(int, row["size"].split("x"))
        middle, fast, slow = (1000 / float(row[name]) for name in ("median_ms", "min_ms", "max_ms"))
        found[height * width] = (height * width, middle, middle - slow, fast - middle)
    return [found[area] for area in sorted(found)]


def decorate(axes, rows):
    """Set scales, ticks at the sizes that were measured, and titles."""
    shapes = {row["size"] for row in find(rows, group="model", task="forward", batch=1)}
    sizes = {pixels(size): size.replace("x", " x ") for size in shapes}
    axes.set(xscale="log", yscale="log", xlabel="image, pixels", ylabel="images a second, one at a time")
    axes.set_xticks(list(sizes), list(sizes.values()), fontsize=8)
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.minorticks_off()
    dtypes = ", ".join(sorted({row["dtype"] for row in find(rows, group="model", batch=1)}))
    axes.set_title(f"forward pass on {rows[0]['device']}, {rows[0]['threads']} CPU threads, {dtypes}", fontsize=9)
    axes.grid(True, which="major", color="0.9")
    axes.legend(fontsize=8, frameon=False)


def pixels(size):
    """Return the pixels of a size such as "512x512"."""
    height, width = map(int, size.split("x"))
    return height * width


if __name__ == "__main__":
    sys.exit(run_command(main))
