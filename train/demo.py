"""The demonstration: learn to find and name small digits on photographs, and the photographs' kinds, on two CPU cores.

    python -m train.demo [--config digits_panoptic_nano] [--section.key VALUE ...]

As in the paper, a classifier comes first: the backbone learns to read single digits (``--backbone``). Then nano AFF
with Mask2Former learns to segment. Prints PQ and AP beside what the untrained network gets, how hard the pictures are
and the focus ratio, and draws ``grid.png`` in the output folder. The exit code is 1 if AP stays below ENOUGH.
"""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from .common.distributed import Ranks
from .common.errors import Parser, UserError, run_command
from .config.loader import load_config
from .config.segmentation import Config
from .data.segmentation import open_sets
from .data.segmentation_dataset import EvalDataset
from .engine.command_line import PICTURE, REPORT, begin_demo, clear
from .engine.loop import train
from .engine.run import Run
from .inference.segmentation import predict
from .inference.tokens import find_tokens
from .metrics.focus_ratio import measure_focus
from .models.autocast import autocast
from .models.checkpoint import LAST
from .models.segmenter import build_model
from .tasks.segmentation import Segmentation, evaluate
from .visualization.figures import as_png
from .visualization.segments import draw_segments, list_segments, target_segments
from .visualization.tokens import draw_tokens, stride_legend

ENOUGH = 10.0  # AP in percent
SCORES = ("PQ", "PQ_things", "PQ_stuff", "AP", "AP50", "AP_small")
SHOWN = 6  # pictures of the grid, one a row


def main(arguments: list[str]) -> int:
    """Run the command."""
    parser = Parser("train.demo", __doc__, "overrides: as python -m train.segment --help lists them")
    parser.add_argument("--config", default="digits_panoptic_nano", help="a config with data.source: digits")
    parser.add_argument("--backbone", default="digits_backbone", help="config of train.classify for the backbone")
    parser.add_argument("--fresh", action="store_true", help="start anew in a folder that holds another run")
    options, overrides = parser.parse_known_args(arguments)
    config = load_config(options.config, overrides, Config)
    if config.data.source != "digits" or config.data.task not in (None, "panoptic"):
        raise UserError(f"the demonstration is panoptic, on Scattered Digits; {options.config} is not")
    outputs = begin_demo(Path(config.run.output), options.fresh)
    start = time.perf_counter()
    untrained = measure_untrained(config)
    first = train_backbone(options.backbone, config)
    config.model.backbone_init = str(first.folder / LAST)
    run = train(config, task=Segmentation(config))
    model = run.model.cpu()
    report = {
        "scores": {name: run.last.get(name) for name in SCORES},
        "focus_ratio": focus(model, run.val_set),
        "untrained": untrained,
        "validation_pictures": len(run.val_set),
        "backbone_pictures": first.done * first.config.run.total_batch,
        "backbone_accuracy": first.last["top1"],
        "training_pictures": run.done * config.run.total_batch,
        "minutes": (time.perf_counter() - start) / 60,
        "threads": torch.get_num_threads(),
    }
    outputs.write(PICTURE, as_png(draw_grid(model, run)))
    outputs.write(REPORT, json.dumps(report, indent=1).encode())
    print(describe(report, run))
    return 0 if (report["scores"]["AP"] or 0) >= ENOUGH else 1


def train_backbone(name: str, config: Config) -> Run:
    """Train a classifier of single digits by the config of that name."""
    folder = Path(config.run.output) / "backbone"
    clear(folder)
    return train(load_config(name, ["--run.output", str(folder)]))


def measure_untrained(config: Config) -> dict:
    """Evaluate the network as it is before training: scores and focus ratio."""
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    samples = open_sets(config)[1]
    torch.manual_seed(config.run.seed)
    model = build_model(config)
    scores = evaluate(model, samples, config, Ranks("cpu"))
    return {"scores": {name: scores.get(name) for name in SCORES}, "focus_ratio": focus(model, samples)}


def focus(model: nn.Module, samples: EvalDataset) -> list[float]:
    """Measure the focus ratio after each merge, over all validation pictures."""
    model.eval()
    found = measure_focus(lambda images: model.backbone.run_stages(images)[0], samples.source.pictures, len(samples))
    return [each.ratio for each in found]


def describe(report: dict, run: Run) -> str:
    """Describe the numbers."""
    before, after = report["untrained"], report["scores"]
    look = asdict(run.val_set.source.pictures.config)
    lines = [
        "",
        f"on {report['validation_pictures']:,} validation pictures, in percent:   trained   untrained",
        *(f"  {name:12} {shown(after[name]):>8} {shown(before['scores'][name]):>8}" for name in SCORES),
        f"AP of at least {ENOUGH:g} asked for: {'reached' if (after['AP'] or 0) >= ENOUGH else 'NOT reached'}",
        f"training     {report['backbone_pictures']:,} pictures of one digit as a classifier "
        f"({100 * report['backbone_accuracy']:.1f} % right), then {report['training_pictures']:,} pictures",
        f"  in all     {report['minutes']:.1f} minutes; threads {report['threads']}, loaders {run.config.data.workers}",
        f"how hard     {', '.join(f'{key} {value}' for key, value in look.items())}",
        f"focus ratio  {ratios(report['focus_ratio'])}   (tokens per area, in digits' boxes over outside; blind: 1)",
        f"  untrained  {ratios(before['focus_ratio'])}",
        f"picture      {run.folder / PICTURE}",
    ]
    return "\n".join(lines)


def shown(value: float | None) -> str:
    """Write a score, or a dash where there is none."""
    return "-" if value is None else f"{value:.1f}"


def ratios(values: list[float]) -> str:
    """Write the ratio of each merge."""
    return "  ".join(f"merge {number}: {value:.2f}" for number, value in enumerate(values, 1))


def draw_grid(model: nn.Module, run: Run) -> Figure:
    """Draw validation pictures in rows: the picture, the target, the prediction, the tokens kept after each merge."""
    figure = Figure(figsize=(2.6 * 6, 2.65 * SHOWN + 0.7), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.05, 1, 0.95))
    rows = figure.subplots(SHOWN, 6, squeeze=False)
    titles = ["picture", "target", "prediction", *(f"tokens kept by merge {number}" for number in (1, 2, 3))]
    for axes, title in zip(rows[0], titles, strict=True):
        axes.set_title(title)
    strides = set().union(*(draw_row(row, model, run, index) for index, row in enumerate(rows)))
    stride_legend(figure, strides)
    return figure


def draw_row(row, model: nn.Module, run: Run, index: int) -> set[int]:
    """Draw one validation picture, and return the strides of the tokens drawn."""
    source, config = run.val_set.source, run.config
    sample = source.load(index % len(source))
    prepared = run.val_set[0, index % len(source)].image
    found = predict(
        model, prepared, sample.image.shape[:2], ["panoptic"], source.vocabulary, config.evaluator,
        autocast(config, run.ranks),
    )["panoptic"]  # fmt: skip
    draw_segments(row[0], sample.image, [])
    draw_segments(row[1], sample.image, target_segments(sample, source.vocabulary), 7)
    draw_segments(row[2], sample.image, list_segments("panoptic", found, source.vocabulary, 0), 7)
    stages = find_tokens(model, prepared.image)[1:]
    for axes, stage in zip(row[3:], stages, strict=True):
        draw_tokens(axes, sample.image, stage["positions"], stage["strides"])
    return set(np.concatenate([stage["strides"] for stage in stages]).tolist())


if __name__ == "__main__":
    sys.exit(run_command(main))
