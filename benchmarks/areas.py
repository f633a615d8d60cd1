"""Draw the AP of an ablation's rows by the objects' area, seed by seed.

python -m benchmarks.areas CSV --config nuclei --rows full,gridded [--out PICTURE]

Reads the CSV file of ``train.ablate``, of the seeds that all rows have, and prints means and, against the first row,
the mean differences with 95 % intervals; draws CSV's name with _areas.png.
"""

import statistics
import sys

import matplotlib.figure

from train.ablation.table import interval
from train.common.errors import run_command

from .ablation import COLOURS, read_ablation
from .results import write_picture

SCORES = {"AP": "all", "AP_small": "up to {0:g} px", "AP_medium": "{0:g} to {1:g} px", "AP_large": "above {1:g} px"}
COCO_AREAS = (32**2, 96**2)
SPREAD = 0.5  # of the unit that a group of rows takes


def main(arguments):
    """Run the command."""
    table = read_ablation("benchmarks.areas", __doc__.splitlines()[0], arguments, "_areas.png")
    scores = [score for score in SCORES if all(None not in table.values(name, score) for name in table.rows)]
    rows = {name: {score: table.values(name, score) for score in scores} for name in table.rows}
    seeds = table.seeds
    print(f"{len(seeds)} seeds: {', '.join(map(str, seeds))}")
    for name, values in rows.items():
        print(name, *(describe(score, values[score], rows[table.rows[0]][score]) for score in scores), sep="\n    ")
    write_picture(table.picture, draw(rows, table.config.evaluator.areas or COCO_AREAS, len(seeds)))
    return 0


def describe(score, values, first):
    """Write a row's mean, and its difference from the first row's."""
    text = f"{score:10} {statistics.mean(values):5.1f}"
    return text if values is first else f"{text}  {interval([a - b for a, b in zip(values, first, strict=True)])}"


def draw(rows, areas, seeds):
    """Return a figure: for all objects and for each area the rows side by side, grey lines a seed, points the mean."""
    scores = list(next(iter(rows.values())))
    figure = matplotlib.figure.Figure(figsize=(7.5, 3.6), layout="constrained")
    axes = figure.subplots()
    offsets = [SPREAD * (place / max(1, len(rows) - 1) - 0.5) for place in range(len(rows))]
    for place, score in enumerate(scores):
        along = [place + offset for offset in offsets]
        for values in zip(*(row[score] for row in rows.values()), strict=True):
            axes.plot(along, values, color="0.75", linewidth=1, marker=".", zorder=1)
        for x, (name, row), colour in zip(along, rows.items(), COLOURS * len(rows), strict=False):
            label = f"{name}, mean of {seeds} seeds" if place == 0 else None
            axes.scatter(x, statistics.mean(row[score]), s=60, color=colour, label=label, zorder=2)
    axes.set_xticks(range(len(scores)), [SCORES[score].format(*areas) for score in scores])
    axes.set(ylabel="AP on validation pictures, %", xlabel="area of the object in the original picture")
    axes.grid(True, axis="y", color="0.9")
    figure.legend(loc="outside upper center", ncols=len(rows), fontsize=8, frameon=False)
    return figure


if __name__ == "__main__":
    sys.exit(run_command(main))
