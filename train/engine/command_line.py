"""What the training commands' lines have in common: which config, which checkpoint to go on from, what to overwrite."""

import argparse
import os
from pathlib import Path

from ..common.errors import Parser, UserError, writing
from ..config.classification import Config
from ..config.loader import help_text
from ..config.section import Section
from ..models.checkpoint import BEST, LAST, PREVIOUS, read_file
from .log import read_line

LOG = "log.jsonl"
HARMLESS = {f"run.{key}" for key in ("output", "device", "threads", "log_every", "save_every", "tensorboard")}
HARMLESS |= {"data.workers", "data.start_method"}


def make_parser(command: str, description: str, kind: type[Section] = Config) -> Parser:
    """Create a parser with the options that every training command has.

    Parameters
    ----------
    command : str
        As in ``python -m command``.
    description : str
    kind : type
        The sections of its configs.

    Returns
    -------
    Parser
        Its result has ``config``, ``resume`` (None, "" for the output folder's last checkpoint, or a path), ``fresh``.
    """
    parser = Parser(command, description, help_text(kind))
    parser.add_argument("--config", required=True, help="a config's name or a YAML file")
    parser.add_argument("--resume", nargs="?", const="", help="go on from the output folder's last.pt, or this file")
    parser.add_argument("--fresh", action="store_true", help="start anew in a folder that already holds a run")
    return parser


def prepare(options: argparse.Namespace, config: Section, kind: str) -> Path | None:
    """Find the checkpoint to resume, of the task's ``kind``, or see that nothing is overwritten unasked."""
    path = find_resume(options, config)
    if path:
        changed = differences(config, path, kind)
        if changed and os.environ.get("RANK", "0") == "0":
            print(f"note: unlike the checkpoint's run: {'; '.join(changed)}")
    elif options.fresh:
        clear(Path(config.run.output))
    return path


def find_resume(options: argparse.Namespace, config: Section) -> Path | None:
    """Find the checkpoint to go on from; None for a new run, which may not overwrite another unasked."""
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
    if not options.fresh and is_foreign(folder / LOG):
        raise UserError(f"{folder / LOG} is no run's log: name another --run.output, or --fresh to replace it")
    return None


def is_foreign(log: Path) -> bool:
    """Whether there is a log whose first line no run has written."""
    try:
        with open(log, "rb") as file:
            first = file.readline(1 << 20)
    except OSError:
        return False
    return bool(first) and read_line(first) is None


def clear(folder: Path) -> None:
    """Remove an earlier run's checkpoints and log."""
    with writing(folder):
        for name in (LAST, PREVIOUS, BEST, LOG):
            (folder / name).unlink(missing_ok=True)


def differences(config: Section, path: Path, kind: str) -> list[str]:
    """List the keys in which a config differs from a checkpoint's, those that change no result left out."""
    now = config.model_dump(mode="json")
    then = type(config).present_names(read_file(path, kind, ("config",))["config"])
    return [
        f"{section}.{key} was {then.get(section, {}).get(key)}, is {value}"
        for section, values in now.items()
        for key, value in values.items()
        if f"{section}.{key}" not in HARMLESS and then.get(section, {}).get(key) != value
    ]
