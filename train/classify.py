"""Train and evaluate a classifier: ``python -m train.classify --config NAME [--data PATH] [--section.key VALUE ...]``.

On several GPUs: ``torchrun --nproc-per-node 8 -m train.classify ...``; on several machines torchrun's ``--nnodes`` and
``--rdzv-endpoint`` besides. The total batch stays what the config says; each process accumulates what it must.
"""

import argparse
import os
import sys
from pathlib import Path

from .checkpoint import BEST, LAST, PREVIOUS, read_file
from .config import Config, help_text, load_config
from .engine import Run, train
from .errors import Parser, UserError, run_command

HARMLESS = {f"run.{key}" for key in ("output", "device", "threads", "log_every", "save_every", "tensorboard")}


def parse(arguments: list[str]) -> tuple[argparse.Namespace, Config]:
    """Read the command line.

    Parameters
    ----------
    arguments : list of str

    Returns
    -------
    options : Namespace
        ``resume`` (None, "" for the output folder's last checkpoint, or a path) and ``fresh``.
    config : Config
    """
    parser = Parser("train.classify", __doc__, help_text())
    parser.add_argument("--config", required=True, help="a config's name or a YAML file")
    parser.add_argument("--resume", nargs="?", const="", help="go on from the output folder's last.pt, or this file")
    parser.add_argument("--fresh", action="store_true", help="start anew in a folder that already holds a run")
    options, overrides = parser.parse_known_args(arguments)
    return options, load_config(options.config, overrides)


def prepare(options: argparse.Namespace, config: Config) -> Path | None:
    """Find the checkpoint to resume, or see that nothing is overwritten unasked."""
    folder = Path(config.run.output)
    last = folder / LAST
    if options.resume is not None:
        path = Path(options.resume) if options.resume else last
        if not options.resume and not last.exists() and (folder / PREVIOUS).exists():
            path = folder / PREVIOUS
        return path
    found = [name for name in (LAST, PREVIOUS, BEST) if (folder / name).exists()]
    if found and not options.fresh:
        raise UserError(f"{folder} already holds a run: add --resume to go on, --fresh to replace it, or --run.output")
    return None


def clear(folder: Path) -> None:
    """Remove an earlier run's checkpoints and log."""
    for name in (LAST, PREVIOUS, BEST, "log.jsonl"):
        (folder / name).unlink(missing_ok=True)


def differences(config: Config, path: Path) -> list[str]:
    """List the keys in which a config differs from a checkpoint's, those that change no result left out."""
    now, then = config.model_dump(mode="json"), read_file(path)["config"]
    return [
        f"{section}.{key} was {then[section].get(key)}, is {value}"
        for section, values in now.items()
        for key, value in values.items()
        if f"{section}.{key}" not in HARMLESS | {"data.workers"} and then.get(section, {}).get(key) != value
    ]


def main(arguments: list[str]) -> int:
    """Run the command."""
    options, config = parse(arguments)
    path = prepare(options, config)
    if path:
        changed = differences(config, path)
        if changed and os.environ.get("RANK", "0") == "0":
            print(f"note: unlike the checkpoint's run: {'; '.join(changed)}")
    elif options.fresh:
        clear(Path(config.run.output))
    run: Run = train(config, path)
    if run.ranks.first:
        print(f"best top-1 {100 * run.best:.2f} %; checkpoints and log.jsonl in {run.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
