"""What a run says: a progress bar or sparse lines, ``log.jsonl``, and TensorBoard."""

import json
import sys
import threading
import time
from pathlib import Path

from tqdm import tqdm

from ..common.errors import drop_output, one_line, writing
from ..common.output_files import write_whole
from ..models.checkpoint import remove_drafts


class Log:
    """Reports of the first rank; the others' are silent.

    Parameters
    ----------
    folder : Path
        Where ``log.jsonl`` and TensorBoard's files go.
    active : bool
        False on all ranks but the first.
    tensorboard : bool
        Write TensorBoard files if the package is there.
    step : int
        Steps done so far; lines of a killed run that lie beyond are dropped.
    owed : bool
        Whether the evaluation after that step will be made again.

    Raises
    ------
    UserError
        The folder cannot be made or written in.
    """

    def __init__(self, folder: Path, active: bool, tensorboard: bool, step: int, owed: bool = False):
        self.active, self.folder, self.writer, self.bar = active, folder, None, None
        if not active:
            return
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            remove_drafts(folder)
            damaged = drop_beyond(folder / "log.jsonl", step, owed)
            if tensorboard:
                self.writer = open_tensorboard(folder, step)
        if damaged:
            self.say(f"note: {damaged} damaged line(s) of {folder / 'log.jsonl'} were cut")

    def say(self, text: str) -> None:
        """Print a line above the progress bar; one that cannot be printed, as on a full disk, ends no training."""
        if self.active:
            try:
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()
            except OSError:
                drop_output()

    def record(self, kind: str, step: int, **values) -> None:
        """Append a line to log.jsonl and put its numbers on TensorBoard.

        Parameters
        ----------
        kind : str
            "train", "eval" or "run".
        step : int
            Updates done.
        **values
            Plain numbers and strings.
        """
        if not self.active:
            return
        with writing(self.folder / "log.jsonl"):
            self.folder.mkdir(parents=True, exist_ok=True)  # whoever removed it while we run loses no training
            with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, float)}
        self.draw(lambda writer: [writer.add_scalar(name, value, step) for name, value in numbers.items()])

    def start_bar(self, place: str, steps: int, done: int) -> None:
        """Show a progress bar over ``steps`` of which ``done`` are done, on a terminal only."""
        hidden = not self.active or not sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=done, desc=place.partition(",")[0], disable=hidden, leave=False)

    def advance(self, **values) -> None:
        """Move the bar by one step."""
        self.bar.set_postfix(values, refresh=False)
        self.bar.update()

    def end_bar(self) -> None:
        """Take the bar away."""
        self.bar.close()

    def draw(self, write) -> None:
        """Write to TensorBoard; where it cannot, as when its files were removed, the training goes on without it."""
        try:
            if self.writer:
                (self.folder / "tensorboard").mkdir(parents=True, exist_ok=True)
                write(self.writer)
                self.writer.flush()
        except (OSError, ValueError) as error:
            self.writer = None
            self.say(f"note: TensorBoard's files cannot be written any more ({one_line(error)}); log.jsonl has all")

    def close(self) -> None:
        """Finish TensorBoard's file."""
        self.draw(lambda writer: writer.close())


def open_tensorboard(folder: Path, step: int):
    """Open TensorBoard's writer, or None where the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    threading.excepthook = end_of_thread
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)


def end_of_thread(end) -> None:
    """Report an error that ended a thread, but leave TensorBoard's of writing to ``Log.draw``, which is told, too."""
    if not (type(end.thread).__module__.startswith("tensorboard.") and isinstance(end.exc_value, OSError)):
        threading.__excepthook__(end)


def drop_beyond(path: Path, step: int, owed: bool = False) -> int:
    """Cut log lines of what a killed run did after its last checkpoint, and lines that are damaged.

    Parameters
    ----------
    path : Path
    step : int
        Steps done so far.
    owed : bool
        Whether the evaluation after that step will be made again: its line is cut, too.

    Returns
    -------
    int
        Damaged lines.
    """
    if not path.is_file():
        return 0
    kept, damaged = [], 0
    for line in path.read_bytes().splitlines():
        found = read_line(line)
        damaged += found is None
        if found and (found["step"] < step or (found["step"] == step and not (owed and found["kind"] == "eval"))):
            kept.append(json.dumps(found).encode() + b"\n")  # a log of before is of one sort from now on
    write_whole(path, b"".join(kept))
    return damaged


def read_line(line: bytes) -> dict | None:
    """Read a line of log.jsonl; None for anything else."""
    try:
        found = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if isinstance(found, dict) and "update" in found:  # what steps were called in logs of version 0.1
        found["step"] = found.pop("update")
    plain = isinstance(found, dict) and type(found.get("step")) is int and isinstance(found.get("kind"), str)
    return found if plain else None


class Pace:
    """Images per second and time left.

    Parameters
    ----------
    left : int
        Steps still to do in the whole run.
    images : int
        Images a step.
    """

    def __init__(self, left: int, images: int):
        self.left, self.images, self.seconds, self.steps = left, images, 0.0, 0
        self.mark = time.perf_counter()

    def pause(self) -> None:
        """Leave out the time until ``resume``, as evaluation's."""
        self.seconds += time.perf_counter() - self.mark

    def resume(self) -> None:
        """Go on counting."""
        self.mark = time.perf_counter()

    def step(self) -> None:
        """Count a step."""
        self.steps += 1
        self.left -= 1

    @property
    def images_per_second(self) -> float:
        """Images a second since this process began to train."""
        elapsed = self.seconds + time.perf_counter() - self.mark
        return self.images * self.steps / elapsed

    @property
    def time_left(self) -> str:
        """Hours, minutes and seconds of training left at this pace, evaluation not counted."""
        if not self.steps:
            return "?"
        return tqdm.format_interval(self.left * self.images / self.images_per_second)
