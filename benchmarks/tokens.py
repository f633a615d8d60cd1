"""Count the tokens that trained segmenters keep on each object of the validation pictures.

python -m benchmarks.tokens CSV --config nuclei --data PATH [--rows full,gridded] [--out CSV]
python -m benchmarks.tokens nuclei --config nuclei_nano --data PATH [--out CSV]

The first reads the checkpoints that ``train.ablate`` left beside its CSV file, the second one segmenter (a checkpoint,
or the name of weights that ship), whose tokens are compared with those of the same network on the grid. Both count,
after each merge, the tokens whose cell has its centre in an object's box; objects by the areas of ``evaluator.areas``,
pictures as they are evaluated (in tiles, at the size for testing). They print a table, means over the seeds, and write
a line for each row, seed and area.
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
from train.config import segmentation
from train.config.loader import load_config
from train.data.segmentation import open_sets
from train.metrics.coco import AREAS
from train.metrics.focus_ratio import find_kept, is_inside
from train.models.checkpoint import LAST, SEGMENTER, TRAINED, read_file
from train.models.segmenter import build_model, load_strictly
from train.models.weights import weights_of

from .results import check_free, write_own

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
    parser.add_argument("weights", help="CSV file of train.ablate, its checkpoints beside it; or a segmenter's weights")
    parser.add_argument("--config", required=True, help="its config, of images on disk")
    parser.add_argument("--rows", help="names of rows, as full,gridded; default: all that have checkpoints")
    parser.add_argument("--out", type=Path, help="CSV file to write; default: outputs/tokens.csv")
    options, overrides = parser.parse_known_args(arguments)
    torch.set_num_threads(1)
    table, out = Path(options.weights), options.out or Path("outputs/tokens.csv")
    check_free(out)
    if table.suffix == ".csv":
        config = load_config(options.config, overrides, Config)
        check_rows(config)
        networks = of_table(table, config, choose_rows(options.rows, config))
    else:
        config = load_config(options.config, overrides, segmentation.Config)
        networks = of_weights(options.weights, config)
    if config.data.source == "digits":
        raise UserError("benchmarks.tokens is for images on disk: train.ablate measures the focus on digits")
    lines = []
    for name, seed, model, val_set in networks:
        counts = count(model.eval(), val_set, config.evaluator)
        found = [(group, counts.of(group, config.evaluator.areas or AREAS)) for group in GROUPS]
        lines += [{"row": name, "seed": seed, "area": group, **each} for group, each in found if each]
    text = [as_line([shown(line[column]) for column in COLUMNS]) for line in lines]
    write_own(out, (as_line(COLUMNS) + "".join(text)).encode())
    print("\n".join(describe(lines)))
    return 0


def of_table(table, config, names):
    """Yield the networks of an ablation's rows: (row, seed, model, validation set) of each checkpoint that is there."""
    folder, shared = table.with_suffix(""), Shared()
    paths = {(name, seed): folder / f"{name}_{seed}" / "segment" / LAST for name, seed in read_runs(table)}
    runs = [run for run, path in paths.items() if run[0] in names and path.is_file()]
    if not runs:
        raise UserError(f"no checkpoint of these rows in {folder}: run python -m train.ablate here first")
    for name, seed in sorted(runs, key=lambda run: (names.index(run[0]), run[1])):
        task = AblatedSegmentation(vary(config, name)[1], config.table.rows[name].without, shared, None)
        train_set, val_set = task.datasets()
        model, path = task.model(train_set), paths[name, seed]
        load_strictly(model, weights_of(read_file(path, SEGMENTER, TRAINED)), str(path))
        yield name, seed, model, val_set


def of_weights(weights, config):
    """Yield one segmenter as it is, and with every second token of every second row: as ``of_table`` does."""
    config.model.init = weights
    val_set = open_sets(config)[1]
    yield Path(weights).stem, 0, build_model(config, val_set.class_names), val_set
    config.model.backbone |= {"alpha": 0}
    yield "gridded", 0, build_model(config, val_set.class_names), val_set


def count(model, val_set, rules):
    """Count the cells and tokens of each object of the validation pictures."""
    areas, cells, tokens = [], [], []
    for kept in find_kept(model, val_set, rules):
        grid = torch.cartesian_prod(torch.arange(kept.grid_size[1]), torch.arange(kept.grid_size[0]))
        found = [[int(is_inside(each, box).sum()) for box in kept.boxes] for each in (grid, *kept.tokens)]
        areas.append(kept.areas)
        cells.append(found[0])
        tokens.append(found[1:])
    return Counts(np.concatenate(areas), np.concatenate(cells), np.concatenate(tokens, axis=1))


def shown(value):
    """Return a number with three places at most."""
    return f"{value:.3f}" if isinstance(value, float) else value


def describe(lines):
    """Yield the table's lines: means over the seeds."""
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
