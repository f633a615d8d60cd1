"""What survives a kill: complete checkpoints, written so that a good one is always there.

A checkpoint is a dict of tensors and plain containers, saved by torch.save and read by ``fast.checkpoints.load``:
reading one never runs code, and its checksums are compared. Writing goes to a draft in the same folder, which is
flushed to the disk before it takes the name ``last.pt``; what had that name becomes ``previous.pt``. By hand, as
torch.save alone leaves half a file when the power fails, and torch.distributed.checkpoint, made for models that no
process holds whole, writes a folder of pickled plans.
"""

import io
import json
import math
import os
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from ..common.errors import UserError, one_line

KIND = "autofocusformer training checkpoint 1"
SEGMENTER = "autofocusformer segmentation checkpoint 1"
COMMANDS = {KIND: "train.classify", SEGMENTER: "train.segment"}
LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
TRAINED = ("config", "model")  # what using a network needs of a checkpoint; what going on needs besides:
FOLDED = ("vocabulary", "classes")
RESUMED = (*TRAINED, "ema", "epoch", "step", "best", "optimizer", "scaler", "random")


def is_count(value) -> bool:
    """Whether a value is a whole number from 0 on."""
    return type(value) is int and value >= 0


def is_weights(value) -> bool:
    """Whether a value is a dict of names to tensors."""
    pairs = value.items() if isinstance(value, dict) else [(None, None)]
    return all(isinstance(name, str) and isinstance(weight, torch.Tensor) for name, weight in pairs)


def is_vocabulary(value) -> bool:
    """Whether a value is what ``train.data.segmentation.pack_vocabulary`` writes."""
    classes = value.get("classes") if isinstance(value, dict) and isinstance(value.get("name"), str) else None
    kinds = {"name": str, "id": int, "is_thing": bool, "color": (tuple, list, type(None))}
    return isinstance(classes, list) and all(
        isinstance(each, dict)
        and each.keys() == kinds.keys()
        and all(isinstance(each[name], kind) for name, kind in kinds.items())
        and (not each["color"] or (len(each["color"]) == 3 and all(map(is_count, each["color"]))))
        for each in classes
    )


FIELDS = {  # of a checkpoint: what each must be, in words and as a test
    "config": ("a config", lambda value: isinstance(value, dict) and all(isinstance(v, dict) for v in value.values())),
    "model": ("weights", is_weights),
    "ema": ("weights, or nothing", lambda value: value is None or is_weights(value)),
    "epoch": ("a count", is_count),
    "step": ("a count", is_count),
    "done": ("a count", is_count),
    "images": ("a count", is_count),
    "averaged": ("true or false", lambda value: isinstance(value, bool)),
    "owed": ("true or false", lambda value: isinstance(value, bool)),
    "best": ("a number", lambda value: type(value) in (int, float) and math.isfinite(value)),
    "optimizer": ("an optimiser's state", lambda value: isinstance(value, dict)),
    "scaler": ("a scaler's state", lambda value: isinstance(value, dict)),
    "random": ("states of generators", lambda value: isinstance(value, list)),
    "vocabulary": ("a list of classes", is_vocabulary),
    "task": ("semantic, instance or panoptic", lambda value: value in ("semantic", "instance", "panoptic")),
    "classes": (
        "names of classes",
        lambda value: value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value)),
    ),
}


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
    torch.save(state | {name: folded(state[name]) for name in FOLDED if name in state}, buffer)
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
        kept = next((p for p in (path, path.with_name(PREVIOUS)) if p.is_file()), "none was there")
        raise UserError(f"cannot save {path}: {error.strerror or error}; the one before is kept: {kept}") from error
    finally:  # also when a second Ctrl-C interrupts
        remove(draft)


def folded(value):
    """Write the lists of classes as text: pickled one by one, those of 60,000 classes are more than is ever read."""
    if isinstance(value, dict) and "classes" in value:
        return value | {"classes": folded(value["classes"])}
    return json.dumps(value) if isinstance(value, list) else value


def unfolded(value):
    """Read what ``folded`` wrote; anything else is given back."""
    if isinstance(value, dict) and "classes" in value:
        return value | {"classes": unfolded(value["classes"])}
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def remove(path: Path) -> None:
    """Remove a file if it is there and can be removed."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def remove_drafts(folder: Path) -> None:
    """Remove what killed runs have left of checkpoints and logs half written."""
    for name in (LAST, BEST, "log.jsonl"):
        for draft in folder.glob(f".{name}.*.tmp"):
            remove(draft)


def sync_folder(folder: Path) -> None:
    """Flush renames in a folder to the disk, where the system allows it."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_file(path: Path, kind: str = KIND, needs: tuple[str, ...] = ()) -> dict:
    """Read a checkpoint of this project, never running code from it.

    Parameters
    ----------
    path : Path
    kind : str
        What the checkpoint must say it is: one of COMMANDS.
    needs : tuple of str
        Fields that must be there. All that are there must be of the type that FIELDS says.

    Returns
    -------
    dict

    Raises
    ------
    UserError
        Missing, truncated, damaged, or something else; the message names a good checkpoint beside it if there is one.
    """
    from .pretrained import load_state

    if not path.is_file():
        raise UserError(f"no checkpoint {path}{beside(path)}")
    try:
        state = load_state(path)
    except OSError as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror or error}{beside(path)}") from error
    except ValueError as error:
        what = "refused" if " was refused: " in str(error) else "damaged"
        raise UserError(f"checkpoint {path} is {what}{beside(path)} ({one_line(error)})") from error
    found = state.get("kind")
    if found != kind:
        known = isinstance(found, str) and found in COMMANDS
        other = f", but of {COMMANDS[found]}" if known else " (official weights: see --official)"
        raise UserError(f"{path} is no checkpoint of {COMMANDS[kind]}{other}{beside(path)}")
    state |= {name: unfolded(state[name]) for name in FOLDED if name in state}
    for name, (what, holds) in FIELDS.items():
        if name in needs and name not in state:
            raise UserError(f"checkpoint {path} lacks {name!r}, {what}{beside(path)}")
        if name in state and not holds(state[name]):
            raise UserError(f"checkpoint {path} is damaged: its {name!r} is not {what}{beside(path)}")
    return state


@contextmanager
def naming(path: str | Path | None):
    """Begin what a checkpoint's own config or weights are refused for with the name of its file."""
    try:
        yield
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"checkpoint {path}: {error}") from error


def beside(path: Path) -> str:
    """Name another checkpoint of the same run, as the tail of a sentence."""
    others = [path.with_name(name) for name in (LAST, PREVIOUS) if path.with_name(name) != path]
    kept = [str(other) for other in others if other.is_file()]
    return f"; the run's other checkpoint is kept: {kept[0]}" if kept else ""
