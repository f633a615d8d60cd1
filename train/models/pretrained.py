"""Weights that ship in the package (``fast/weights``), read as the checkpoints that they were exported from."""

import json
from pathlib import Path

import fast
import fast.checkpoints
from fast.pretrained import HEADER, SUFFIX, list_pretrained, pretrained_file

from ..common.errors import UserError, one_line


def load_state(path: Path) -> dict:
    """Read a checkpoint or weights without running anything in them.

    Parameters
    ----------
    path : Path
        Of any sort that ``fast.checkpoints.load`` reads. Of ``train.export``, it becomes the checkpoint again: kind,
        config, model and what else a prediction needs.

    Returns
    -------
    dict

    Raises
    ------
    OSError, ValueError, ImportError
        As ``fast.checkpoints.load``.
    """
    state = fast.checkpoints.load(path)
    trained = read_header(Path(path)).get("trained") if Path(path).suffix == SUFFIX else None
    return trained | {"model": state, "ema": None} if isinstance(trained, dict) else state


def read_header(path: Path) -> dict:
    """Read what exported weights say of themselves (see :mod:`fast.pretrained`); empty for other safetensors files."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(HEADER, "{}")
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has a damaged header ({one_line(error)})") from error
    return facts if isinstance(facts, dict) else {}


def resolve(weights: str) -> str:
    """Return the checked file of weights that ship if ``weights`` is their name, no file; else ``weights`` itself."""
    return shipped_path(weights) if weights in list_pretrained() and not Path(weights).is_file() else weights


def shipped_path(name: str) -> str:
    """Return the file of weights that ship, checked.

    Raises
    ------
    UserError
        No such weights, or damaged.
    """
    try:
        return str(pretrained_file(name))
    except ValueError as error:
        raise UserError(one_line(error)) from error


def one_of(checkpoint: str | None, official: str | None, pretrained: str | None) -> str | None:
    """Return the checkpoint that a command line names: a file's path, that of ``--pretrained NAME``, or None."""
    if pretrained and (checkpoint or official):
        raise UserError(f"give --pretrained or --{'checkpoint' if checkpoint else 'official'}, not both")
    return shipped_path(pretrained) if pretrained else checkpoint
