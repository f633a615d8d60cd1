"""The five-minute demonstration: learn to read small digits on photographs, on two CPU cores.

    python -m train.demo_classify [--config digits_nano] [--section.key VALUE ...]

Trains, prints validation accuracy beside chance, how hard the pictures are and the focus ratio, and draws ``grid.png``
in the output folder. The exit code is 1 if the accuracy stays below 80 %.
"""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn

from .common.errors import Parser, UserError, run_command
from .config.classification import Config
from .config.loader import load_config
from .data.digits import DigitsConfig, ScatteredDigits
from .data.normalization import to_input
from .engine.command_line import PICTURE, REPORT, begin_demo
from .engine.loop import Run, train
from .inference.classification import find_tokens
from .metrics.focus_ratio import measure_focus
from .models.classifier import build_model
from .visualization.figures import as_png
from .visualization.tokens import bare, draw_tokens, stride_legend

ENOUGH = 0.8
SHOWN = 10  # pictures of the grid, two a row


def main(arguments: list[str]) -> int:
    """Run the command."""
    parser = Parser("train.demo_classify", __doc__, "overrides: as python -m train.classify --help lists them")
    parser.add_argument("--config", default="digits_nano", help="a config with data.source: digits")
    parser.add_argument("--fresh", action="store_true", help="start anew in a folder that holds another run")
    options, overrides = parser.parse_known_args(arguments)
    config = load_config(options.config, overrides)
    if config.data.source != "digits":
        raise UserError(f"the demonstration is on Scattered Digits: {options.config} trains on {config.data.source}")
    outputs = begin_demo(Path(config.run.output), options.fresh)
    untrained = measure(fresh_model(config), config)
    start = time.perf_counter()
    run = train(config)
    seconds = time.perf_counter() - start
    model = (run.ema.module if run.ema else run.model).cpu()
    report = summarise(run, seconds, untrained, measure(model, config))
    outputs.write(PICTURE, as_png(draw_grid(model, run.val_set.source.pictures)))
    outputs.write(REPORT, json.dumps(report, indent=1).encode())
    print(describe(report, config))
    return 0 if report["accuracy"] >= ENOUGH else 1


def fresh_model(config: Config) -> nn.Module:
    """Create the network as it is before training."""
    torch.manual_seed(config.run.seed)
    return build_model(config)


def measure(model: nn.Module, config: Config) -> list[float]:
    """Measure the focus ratio after each merge, over all validation pictures."""
    from .data.classification import open_source

    source = open_source(config, "val")
    model.eval()
    found = measure_focus(lambda images: model.run_stages(images)[0], source.pictures, len(source))
    return [focus.ratio for focus in found]


def summarise(run: Run, seconds: float, untrained: list[float], trained: list[float]) -> dict:
    """Collect the demonstration's numbers."""
    return {
        "accuracy": run.last["ema_top1" if run.ema else "top1"],
        "chance": 1 / run.config.model.num_classes,
        "validation_pictures": len(run.val_set),
        "training_pictures": run.done * run.config.run.total_batch,
        "minutes": seconds / 60,
        "threads": torch.get_num_threads(),
        "focus_ratio": trained,
        "focus_ratio_untrained": untrained,
    }


def describe(report: dict, config: Config) -> str:
    """Describe the numbers."""
    look = asdict(DigitsConfig(**config.data.digits))
    merges = "  ".join(f"merge {number}: {ratio:.2f}" for number, ratio in enumerate(report["focus_ratio"], start=1))
    before = "  ".join(f"merge {number}: {r:.2f}" for number, r in enumerate(report["focus_ratio_untrained"], start=1))
    passed = "reached" if report["accuracy"] >= ENOUGH else "NOT reached"
    return "\n".join(
        [
            "",
            f"validation accuracy  {100 * report['accuracy']:.1f} % on {report['validation_pictures']:,} pictures "
            f"(chance {100 * report['chance']:.0f} %; {100 * ENOUGH:.0f} % asked for: {passed})",
            f"training             {report['training_pictures']:,} pictures in {report['minutes']:.1f} minutes, "
            f"{report['threads']} threads",
            f"how hard             {', '.join(f'{key} {value}' for key, value in look.items())}",
            f"  easier at first    {easier(config)}",
            f"focus ratio          {merges}   (tokens per area, in the digit's box over outside; blind choice: 1)",
            f"  before training    {before}",
            f"picture              {Path(config.run.output) / PICTURE}",
        ]
    )


def easier(config: Config) -> str:
    """Describe which pictures the first epochs train on."""
    first = ", ".join(f"{key} {value}" for key, value in config.data.digits_first.items())
    return (
        f"{config.data.first_epochs} of {config.schedule.epochs} epochs: {first}" if config.data.first_epochs else "no"
    )


def draw_grid(model: nn.Module, pictures: ScatteredDigits) -> Figure:
    """Draw some validation pictures: the picture, the tokens kept after each merge, and the prediction.

    Parameters
    ----------
    model : Module
    pictures : ScatteredDigits

    Returns
    -------
    Figure
        Two pictures a row.
    """
    figure = Figure(figsize=(16, 2.3 * SHOWN / 2 + 0.6), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.05, 1, 0.95))
    figure.suptitle("picture with the digit's box; tokens that each merge kept")
    rows, strides = figure.subplots(SHOWN // 2, 8, squeeze=False).reshape(SHOWN, 4), set()
    for index, row in enumerate(rows):
        scene = pictures.scene(index)
        stages = find_tokens(model, scene.image)
        draw_answer(row[0], scene, predict(model, scene.image))
        for number, (axes, stage) in enumerate(zip(row[1:], stages[1:], strict=True), start=1):
            draw_tokens(axes, scene.image, stage["positions"], stage["strides"])
            strides |= set(stage["strides"].tolist())
            outline(axes, scene)
            axes.set_title(f"merge {number} kept {len(stage['positions'])}", fontsize=9)
    stride_legend(figure, strides)
    return figure


@torch.no_grad()
def predict(model: nn.Module, picture: np.ndarray) -> tuple[int, float]:
    """Return the digit the network sees, and its probability."""
    chances = model(to_input(picture))[0].softmax(0)
    return int(chances.argmax()), float(chances.max())


def draw_answer(axes, scene, answer: tuple[int, float]) -> None:
    """Show a picture with the digit's box, and say what the network took it for."""
    axes.imshow(scene.image)
    outline(axes, scene)
    bare(axes, scene.image)
    target, (digit, chance) = scene.digits[0].label, answer
    verdict = "right" if digit == target else f"wrong: it is {target}"
    weight = "normal" if digit == target else "bold"
    axes.set_title(f"says {digit} ({100 * chance:.0f} %), {verdict}", fontsize=9, weight=weight)


def outline(axes, scene) -> None:
    """Draw the digit's box."""
    x0, y0, x1, y1 = scene.digits[0].box
    axes.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor="white", linewidth=1.2))


if __name__ == "__main__":
    sys.exit(run_command(main))
