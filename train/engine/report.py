"""What a run logs: what is trained, each reported step, its scores."""

import math
from pathlib import Path

from ..tasks.task import Task
from .layers import describe_frozen
from .log import Log, Pace
from .optimizer import peak_rate
from .run import Run


def introduce(run: Run, log: Log, resume: Path | None) -> None:
    """Log what is about to be trained, and how the learning rate and the batch came about."""
    config, section = run.config, run.config.run
    size = sum(parameter.numel() for parameter in run.model.parameters())
    log.say(f"{config.model.name}: {size:,} parameters on {run.ranks.device}, {run.ranks.size} process(es)")
    for line in describe_frozen(run.model, config.optim.freeze):
        log.say(line)
    counts = f"{len(run.train_set):,} training and {len(run.val_set):,} validation images"
    log.say(f"{counts} {run.train_set.describe()}; {run.progress.describe()}")
    for note in dict.fromkeys([*run.train_set.notes, *run.val_set.notes]):
        log.say(f"note: {note}")
    log.say(
        f"total batch {section.total_batch} = {section.batch_size} x {run.ranks.size} process(es) x {run.accumulation} "
        f"accumulation step(s); {peak_rate(config)[1]}"
    )
    if resume:
        place, goal = run.place
        log.say(f"resumed {resume} at {place} of {goal}")
        for note in run.notes:
            log.say(f"note: {note}")
    log.record("run", run.done, config=config.model_dump(mode="json"), resumed=str(resume) if resume else None)


def report_bad(run: Run, log: Log, batches: list) -> None:
    """Name the images that were skipped."""
    for line in (line for batch in batches for line in run.bad.note(batch)):
        log.say(line)


def report(run: Run, log: Log, pace: Pace, loss: float, norm: float, rate: float) -> None:
    """Log a step."""
    speed, bad = pace.images_per_second, len(run.bad.seen)
    shown = norm if math.isfinite(norm) else None
    values = {"epoch": run.epoch + 1, "loss": loss, "lr": rate, "grad_norm": shown, "images_per_s": speed}
    log.record("train", run.done, **values, bad_images=bad)
    if log.bar.disable:
        place, goal = run.place
        log.say(f"{place} of {goal}: loss {loss:.3f} lr {rate:.2e} {speed:.1f} images/s, {pace.time_left} left")


def describe_scores(task: Task, values: dict, best: float) -> str:
    """Return an evaluation (the averaged weights' numbers start with ``ema_``) and the best score in words."""
    shown = ", ".join(
        f"{prefix}{name} {task.percent * values[prefix + name]:.2f} %"
        for prefix in ("", "ema_")
        for name in task.shown
        if values.get(prefix + name) is not None
    )
    nothing = "nothing to score" if values else "no validation image could be read"
    return f"{shown or nothing}; best {task.metric_name} {task.percent * best:.2f} %"
