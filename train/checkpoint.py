"""What survives a kill: complete checkpoints, written so that a good one is always there.

A checkpoint is a dict of tensors and plain containers, saved by torch.save and read with ``weights_only=True``: reading
one never runs code. Writing goes to a temporary file in the same folder, which is flushed to the disk before it takes
the name ``last.pt``; what had that name becomes ``previous.pt``.
"""

import io
import os
import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import torch

from .errors import UserError, one_line

KIND = "autofocusformer training checkpoint 1"
SEGMENTER = "autofocusformer segmentation checkpoint 1"
COMMANDS = {KIND: "train.classify", SEGMENTER: "train.segment"}
LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"


def write_file(path: Path, state: dict) -> None:
    """Write a state dict so that ``path`` holds either the old or the new one, whenever the power fails.

    Parameters
    ----------
    path : Path
    state : dict
        Tensors and plain containers.

    Raises
    ------
    UserError
        The disk is full or not writable; ``path`` is as it was.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(draft, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        if path.name == LAST and path.exists():
            os.replace(path, path.with_name(PREVIOUS))
        os.replace(draft, path)
        sync_folder(path.parent)
    except OSError as error:
        draft.unlink(missing_ok=True)
        kept = next((p for p in (path, path.with_name(PREVIOUS)) if p.exists()), "none was there")
        raise UserError(f"cannot save {path}: {error.strerror or error}; the one before is kept: {kept}") from error


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last, where the system allows it."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_file(path: Path, kind: str = KIND) -> dict:
    """Read a checkpoint of this project, never running code from it.

    Parameters
    ----------
    path : Path
    kind : str
        What the checkpoint must say it is: one of COMMANDS.

    Returns
    -------
    dict

    Raises
    ------
    UserError
        Missing, truncated, damaged, or something else; the message names a good checkpoint beside it if there is one.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint {path}{beside(path)}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise UserError(f"checkpoint {path} is damaged in {damaged}{beside(path)}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, EOFError, RuntimeError, OSError) as error:
        raise UserError(f"checkpoint {path} is truncated or damaged{beside(path)} ({one_line(error)})") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"checkpoint {path} is refused: it holds more than tensors{beside(path)}") from error
    found = state.get("kind") if isinstance(state, dict) else None
    if found != kind:
        other = f", but of {COMMANDS[found]}" if found in COMMANDS else " (official weights: see --official)"
        raise UserError(f"{path} is no checkpoint of {COMMANDS[kind]}{other}{beside(path)}")
    return state


def beside(path: Path) -> str:
    """Name another checkpoint of the same run, as the tail of a sentence."""
    others = [path.with_name(name) for name in (LAST, PREVIOUS) if path.with_name(name) != path]
    kept = [str(other) for other in others if other.is_file()]
    return f"; the run's other checkpoint is kept: {kept[0]}" if kept else ""


def random_states() -> dict:
    """Collect the states of python's, NumPy's and torch's generators, as tensors and plain containers."""
    name, keys, place, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), place, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_states(states: dict) -> None:
    """Put generators back to the states that ``random_states`` collected."""
    version, inner, gauss = states["python"]
    random.setstate((version, tuple(inner), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
