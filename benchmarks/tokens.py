"""Count the tokens that an ablation's trained networks keep on each object of the validation pictures.

python -m benchmarks.tokens CSV --config nuclei --data PATH [--rows full,gridded] [--out CSV]

Reads the checkpoints that ``train.ablate`` left beside its CSV file, and counts, after each merge, the tokens whose
cell has its centre in an object's box; objects by the areas of ``evaluator.areas``, pictures as they are evaluated (in
tiles, at the size for testing). Prints a table, means over the seeds, and writes a line for each row, seed and area.
"""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from train.ablate import check_rows, choose_rows, vary
from train.ablation.pictures import Shared
from train.ablation.rows import AblatedSegmentation, Config
from train.ablation.table import as_line, read_runs
from train.common.errors import Parser, UserError, run_command
from train.config.loader import load_config
from train.metrics.coco import AREAS
from train.metrics.focus_ratio import find_kept, is_inside
from train.models.checkpoint import LAST, SEGMENTER, TRAINED, read_file
from train.models.segmenter import load_strictly
from train.models.weights import weights_of

GROUPS = ("all", "small", "medium", "large")
MERGES = (1, 2, 3)
COUNTED = [f"{what}_{merge}" for what in ("tokens", "none") for merge in MERGES]
COLUMNS = ("row", "seed", "area", "objects", "cells", *COUNTED)


@dataclass(frozen=True)
class Counts:
    """Of each object: area in pixels of the original (n,); cells (n,) and tokens after each merge (3, n) in its box."""

    areas: np.ndarray
    cells: np.ndarray
    tokens: np.ndarray

    def of(self, group, borders):
        """Return means of cells and tokens and the percentage of objects without a token; empty if there is none."""
        small, large = self.areas < borders[0], self.areas >= borders[1]
        chosen = {"all": small | True, "small": small, "medium": ~small & ~large, "large": large}[group]
        tokens = self.tokens[:, chosen]
        if not chosen.any():
            return {}
        return {
            "objects": int(chosen.sum()),
            "cells": float(self.cells[chosen].mean()),
            **{f"tokens_{merge}": float(tokens[merge - 1].mean()) for merge in MERGES},
            **{f"none_{merge}": 100 * float((tokens[merge - 1] == 0).mean()) for merge in MERGES},
        }


def main(arguments):
    """Run the command."""
    parser = Parser("benchmarks.tokens", __doc__.splitlines()[0])
    parser.add_argument("table", type=Path, help="CSV file of train.ablate, its checkpoints in a folder of its name")
    parser.add_argument("--config", required=True, help="its config, of images on disk")
    parser.add_argument("--rows", help="names of rows, as full,gridded; default: all that have checkpoints")
    parser.add_argument("--out", type=Path, help="CSV file to write; default: beside the other, its name after tokens_")
    options, overrides = parser.parse_known_args(arguments)
    config = load_config(options.config, overrides, Config)
    check_rows(config)
    if config.data.source == "digits":
        raise UserError("benchmarks.tokens is for images on disk: train.ablate measures the focus on digits")
    names, folder = choose_rows(options.rows, config), options.table.with_suffix("")
    runs = [run for run in read_runs(options.table) if run[0] in names and file_of(folder, *run).is_file()]
    if not runs:
        raise UserError(f"no checkpoint of these rows in {folder}: run python -m train.ablate here first")
    shared, lines = Shared(), []
    for name, seed in sorted(runs, key=lambda run: (names.index(run[0]), run[1])):
        counts = count(config, name, seed, folder, shared)
        found = [(group, counts.of(group, config.evaluator.areas or AREAS)) for group in GROUPS]
        lines += [{"row": name, "seed": seed, "area": group, **each} for group, each in found if each]
    out = options.out or options.table.with_name(f"tokens_{options.table.name}")
    text = [as_line([shown(line[column]) for column in COLUMNS]) for line in lines]
    out.write_text(as_line(COLUMNS) + "".join(text), encoding="utf-8")
    print("\n".join(describe(lines)))
    return 0


def file_of(folder, name, seed):
    """Return where ``train.ablate`` leaves a segmenter's weights."""
    return folder / f"{name}_{seed}" / "segment" / LAST


def count(config, name, seed, folder, shared):
    """Count the cells and tokens of each object of the validation pictures, for a run's weights."""
    torch.set_num_threads(1)
    varied = vary(config, name, seed, f"{folder}/{name}_{seed}")[1]
    task = AblatedSegmentation(varied, config.table.rows[name].without, shared, None)
    train_set, val_set = task.datasets()
    model, path = task.model(train_set), file_of(folder, name, seed)
    load_strictly(model, weights_of(read_file(path, SEGMENTER, TRAINED)), str(path))
    areas, cells, tokens = [], [], []
    for kept in find_kept(model.eval(), val_set, varied.evaluator):
        grid = torch.cartesian_prod(torch.arange(kept.grid_size[1]), torch.arange(kept.grid_size[0]))
        found = [[int(is_inside(each, box).sum()) for box in kept.boxes] for each in (grid, *kept.tokens)]
        areas.append(kept.areas)
        cells.append(found[0])
        tokens.append(found[1:])
    return Counts(np.concatenate(areas), np.concatenate(cells), np.concatenate(tokens, axis=1))


def shown(value):
    """Write a number with three places at most."""
    return f"{value:.3f}" if isinstance(value, float) else value


def describe(lines):
    """Write the table's lines: means over the seeds."""
    yield "| row | seeds | objects | cells | tokens after merge 1 / 2 / 3 | without a token, % |"
    yield "|---|---|---|---|---|---|"
    for name in dict.fromkeys(line["row"] for line in lines):
        for group in GROUPS:
            own = [line for line in lines if (line["row"], line["area"]) == (name, group)]
            if not own:
                continue
            mean = {column: statistics.mean(line[column] for line in own) for column in COLUMNS[3:]}
            tokens = " / ".join(f"{mean[f'tokens_{merge}']:.2f}" for merge in MERGES)
            none = " / ".join(f"{mean[f'none_{merge}']:.1f}" for merge in MERGES)
            yield f"| {name} | {len(own)} | {group} ({mean['objects']:.0f}) | {mean['cells']:.1f} | {tokens} | {none} |"


if __name__ == "__main__":
    sys.exit(run_command(main))
