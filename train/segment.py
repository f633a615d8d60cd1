"""Train and evaluate a segmenter: ``python -m train.segment --config NAME [--data PATH] [--section.key VALUE ...]``.

On several GPUs: ``torchrun --nproc-per-node 8 -m train.segment ...``; on several machines torchrun's ``--nnodes`` and
``--rdzv-endpoint`` besides. The total batch stays what the config says; each process accumulates what it must.

    --model.backbone_init FILE     start from a classifier's backbone, ours or official
    --official FILE                start from an official segmenter
    --official FILE --evaluate     evaluate it, without training (--model.init FILE: one of ours)
"""

import sys
from pathlib import Path

from .common.distributed import Ranks
from .common.errors import UserError, run_command
from .config.loader import load_config
from .config.segmentation import Config
from .data.segmentation import open_sets
from .engine.command_line import make_parser, prepare
from .engine.loop import train
from .metrics.submission import create_writer
from .models.checkpoint import SEGMENTER
from .models.segmenter import build_model
from .tasks.segmentation import Segmentation, evaluate


def main(arguments: list[str]) -> int:
    """Run the command."""
    parser = make_parser("train.segment", __doc__, Config)
    parser.add_argument("--official", help="official segmenter to start from; the same as --model.init")
    parser.add_argument(
        "--evaluate", action="store_true", help="evaluate the weights of --official or --model.init only"
    )
    parser.add_argument("--results", help="with --evaluate: folder for results in the data set's official formats")
    options, overrides = parser.parse_known_args(arguments)
    config = load_config(options.config, overrides, Config)
    if options.official:
        config.model.init = options.official
    if options.evaluate:
        return evaluate_weights(config, options.results)
    if options.results:
        raise UserError("--results needs --evaluate: training writes checkpoints and scores")
    run = train(config, prepare(options, config, SEGMENTER), Segmentation(config))
    if run.ranks.first:
        print(f"best score {run.best:.2f} %; checkpoints and log.jsonl in {run.folder}")
    return 0


def evaluate_weights(config: Config, results: str | None) -> int:
    """Evaluate weights on the validation pictures, and write the predictions if asked."""
    if not config.model.init:
        raise UserError("name the weights to evaluate: --official FILE, or --model.init FILE")
    ranks = Ranks(config.run.device)
    try:
        samples = open_sets(config)[1]
        source, model = samples.source, build_model(config, samples.class_names)
        tasks = config.evaluator.tasks or [source.task]
        writers = {task: create_writer(task, Path(results), source.vocabulary) for task in tasks} if results else {}

        def note(name: str, predictions: dict) -> None:
            for task, writer in writers.items():
                writer.add(name, predictions[task])

        values = evaluate(model.to(ranks.device), samples, config, ranks, note=note)
        for writer in writers.values():
            writer.close(ranks)
    finally:
        ranks.close()
    if not values:
        raise UserError("no validation picture could be evaluated")
    if ranks.first:
        print_scores(values)
    return 0


def print_scores(values: dict) -> None:
    """Print an evaluation's numbers, one a line, then those of each class, a class a line."""
    for name, value in values.items():
        if name not in ("score", "per_class"):
            print(f"{name:16} {shown(value)}")
    classes = values.get("per_class") or {}
    columns = list(dict.fromkeys(key for each in classes.values() for key in each))
    rows = {name: [shown(each.get(column)) for column in columns] for name, each in classes.items()}
    width = max(map(len, ["class", *rows]))
    for name, cells in [("class", columns), *rows.items()] if rows else ():
        print("  ".join([f"{name:{width}}", *(f"{cell:>7}" for cell in cells)]))


def shown(value: float | int | None) -> str:
    """Write a number: counts as they are, scores with two places, a dash for none."""
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(run_command(main))
