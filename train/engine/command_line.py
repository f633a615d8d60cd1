"""What the training commands' lines have in common: which config, which checkpoint to go on from, what to overwrite."""

import argparse
import os
from pathlib import Path

from ..common.errors import Parser, UserError, writing
from ..common.output_files import Outputs
from ..config.classification import Config
from ..config.loader import help_text
from ..config.section import Section
from ..models.checkpoint import BEST, LAST, PREVIOUS, read_file
from .log import read_line

LOG, REPORT, PICTURE = "log.jsonl", "demo.json", "grid.png"
HARMLESS = {f"run.{key}" for key in ("output", "device", "threads", "log_every", "save_every", "tensorboard")}
HARMLESS |= {"data.workers", "data.start_method", "data.cache"}


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
    if options.fresh and not (path and is_inside(path, Path(config.run.output))):
        clear(Path(config.run.output))
    return path


def find_resume(options: argparse.Namespace, config: Section) -> Path | None:
    """Find the checkpoint to go on from; None for a new run. A run in another folder is not overwritten unasked."""
    folder = Path(config.run.output)
    path = Path(options.resume) if options.resume else None
    if options.resume == "":
        alone = (folder / PREVIOUS).exists() and not (folder / LAST).exists()
        path = folder / (PREVIOUS if alone else LAST)
    if not options.fresh and not (path and is_inside(path, folder)):
        check_free(folder)
    return path


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a file lies in a folder, not deeper."""
    return path.parent.resolve() == folder.resolve()


def check_free(folder: Path) -> None:
    """Refuse a folder that holds a run, or a log that no run has written."""
    found = [name for name in (LAST, PREVIOUS, BEST) if (folder / name).exists()]
    if found:
        raise UserError(
            f"{folder} already holds a run: add --resume (no file) to go on, --fresh to replace it, or --run.output"
        )
    if is_foreign(folder / LOG):
        raise UserError(f"{folder / LOG} is no run's log: name another --run.output, or --fresh to replace it")


def is_foreign(log: Path) -> bool:
    """Whether there is a log whose first line no run has written."""
    try:
        with open(log, "rb") as file:
            first = file.readline(1 << 20)
    except OSError:
        return False
    return bool(first) and read_line(first) is None


def clear(folder: Path) -> None:
    """Remove an earlier run's checkpoints and log, and what a demonstration reported of it."""
    with writing(folder):
        for name in (LAST, PREVIOUS, BEST, LOG):
            (folder / name).unlink(missing_ok=True)
    for name in (REPORT, PICTURE):
        Outputs(folder).remove(name)


def begin_demo(folder: Path, fresh: bool) -> Outputs:
    """Make room for a demonstration's run: in place of another demonstration, or, unless ``fresh``, of nothing.

    Raises
    ------
    UserError
        The folder holds a run that is no demonstration's, or other files of these names.
    """
    outputs = Outputs(folder)
    outputs.check([REPORT, PICTURE])
    if not fresh and not outputs.is_own(REPORT):
        check_free(folder)
    clear(folder)
    outputs.write(REPORT, b"{}\n")  # marks the run as a demonstration's, should it be interrupted
    return outputs


def differences(config: Section, path: Path, kind: str) -> list[str]:
    """List the keys in which a config differs from a checkpoint's, those that change no result left out."""
    now, usual = config.model_dump(mode="json"), type(config)().model_dump(mode="json")
    then = type(config).present_names(read_file(path, kind, ("config",))["config"])
    then = {section: values | then.get(section, {}) for section, values in usual.items()}  # options that came later
    return [
        f"{section}.{key} was {then[section].get(key)}, is {value}"
        for section, values in now.items()
        for key, value in values.items()
        if f"{section}.{key}" not in HARMLESS and then[section].get(key) != value
    ]
