"""The loop: read batches, step, log, save; and stop cleanly when asked to.

One update:  for each piece of the batch  ->  forward under autocast, loss / pieces, backward
             mean loss over ranks, finite? ->  unscale, clip, step, schedule, averaged weights
"""

import json
import math
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from ..common.distributed import Ranks
from ..common.errors import Interrupted, UserError, writing
from ..config.section import Section
from ..data.loader import grouped, load
from ..models.autocast import autocast
from ..models.checkpoint import LAST, PREVIOUS
from ..models.layers import describe_frozen
from ..tasks.classification import Classification
from ..tasks.task import Task
from .log import Log, Pace
from .run import Run
from .state import set_training


def train(config: Section, resume: Path | None = None, task: Task | None = None) -> Run:
    """Train and evaluate as a config says.

    Parameters
    ----------
    config : Section
        A Config of the task's kind.
    resume : Path, optional
        Checkpoint to go on from.
    task : Task, optional
        By default classification.

    Returns
    -------
    Run
        At its end, with ``model``, ``ema`` and ``best``.

    Raises
    ------
    UserError
        Anything the user can put right.
    Interrupted
        After Ctrl-C or SIGTERM; the state is saved.
    """
    ranks = Ranks(config.run.device)
    try:
        run = Run(config, ranks, task or Classification(config))
        if resume:
            run.restore(resume)
        log = Log(run.folder, ranks.first, config.run.tensorboard, run.done, run.owed)
        introduce(run, log, resume)
        with run.stop.listening():
            try:
                fit(run, log)
            except KeyboardInterrupt:
                raise stop_at_once(run) from None
        log.close()
        return run
    finally:
        ranks.close()


def introduce(run: Run, log: Log, resume: Path | None) -> None:
    """Say what is about to be trained, and how the learning rate and the batch came about."""
    config, section, task = run.config, run.config.run, run.task
    size = sum(parameter.numel() for parameter in run.model.parameters())
    log.say(f"{config.model.name}: {size:,} parameters on {run.ranks.device}, {run.ranks.size} process(es)")
    for line in [*describe_frozen(run.model, config.optim.freeze), *task.describe_plan(run)]:
        log.say(line)
    log.say(
        f"total batch {section.total_batch} = {section.batch_size} x {run.ranks.size} process(es) x {run.pieces} "
        f"piece(s); {task.peak_rate(config)[1]}"
    )
    if resume:
        place, goal = task.place(run)
        log.say(f"resumed {resume} at {place} of {goal}")
        for note in run.notes:
            log.say(f"note: {note}")
    log.record("run", run.done, config=config.model_dump(mode="json"), resumed=str(resume) if resume else None)


def fit(run: Run, log: Log) -> None:
    """Train the epochs that are left, evaluating and saving after each."""
    pace = Pace(run.total - run.done, run.config.run.total_batch)
    if run.owed:
        conclude(run, log)
    while run.done < run.total:
        pace.resume()
        train_epoch(run, log, pace)
        pace.pause()
        conclude(run, log)


def conclude(run: Run, log: Log) -> None:
    """Make the evaluation that an epoch's end owes, if it does, and save."""
    if run.owed:
        judge(run, log)
        run.owed = False
    if run.at_end:
        run.epoch, run.step = run.epoch + 1, 0
    run.save()


def train_epoch(run: Run, log: Log, pace: Pace) -> None:
    """Make the updates that are left of an epoch."""
    section, every = run.config.run, run.task.epochs_between(run.config)
    keys = run.task.keys(run)
    set_training(run.model, section.batch_norm)
    log.start_bar(*run.task.place(run), run.step)
    cuda = run.ranks.device.type == "cuda"
    for pieces in grouped(load(run.train_set, keys, run.config, cuda), run.pieces):
        report_bad(run, log, pieces)
        rate = run.rate
        loss, norm, stopped = update(run, pieces)
        run.step += 1
        run.owed = run.at_end and ((run.epoch + 1) % every == 0 or run.done == run.total)
        pace.step()
        log.advance(loss=f"{loss:.3f}", lr=f"{rate:.2e}", images_s=f"{pace.images_per_second:.1f}", left=pace.time_left)
        if run.done % section.log_every == 0 or run.step == run.updates or run.done == run.total:
            report(run, log, pace, loss, norm, rate)
        if stopped:
            leave(run)
        if run.done % section.save_every == 0 or run.owed:
            run.save()
    log.end_bar()


def update(run: Run, pieces: list) -> tuple[float, float, bool]:
    """Make one update of the weights.

    Parameters
    ----------
    run : Run
    pieces : list of batches
        This rank's part of the batch.

    Returns
    -------
    loss : float
        Mean over the whole batch.
    norm : float
        Norm of the gradient before clipping.
    stopped : bool
        Whether any rank was asked to stop.
    """
    total = torch.zeros((), device=run.ranks.device)
    for number, batch in enumerate(run.task.share(run, pieces), start=1):
        last = number == len(pieces)
        with nullcontext() if last or run.ranks.size == 1 else run.forward.no_sync():
            loss = piece_loss(run, batch) / len(pieces)
            run.scaler.scale(loss).backward()
        total += loss.detach()
    mean, stop = run.ranks.sums([total.item() / run.ranks.size, run.stop.signal is not None])
    if not math.isfinite(mean):
        raise not_finite(run, "loss", mean, pieces)
    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.config.optim.clip).item()
    if not math.isfinite(norm) and not run.scaler.is_enabled():
        raise not_finite(run, "gradient norm", norm, pieces)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    run.scheduler.step_update(run.done + 1)
    if run.ema:
        run.ema.update(run.model, run.done)
    return mean, norm, stop > 0


def piece_loss(run: Run, batch) -> torch.Tensor:
    """Compute the mean loss of a piece of the batch."""
    images, targets = run.task.targets(run, batch)
    with autocast(run.config, run.ranks):
        output = run.forward(images)
    return run.task.loss(run, output, targets)


def not_finite(run: Run, what: str, value: float, pieces: list) -> UserError:
    """Save which images met a loss or gradient that is not finite; every rank must call it."""
    mine = [run.train_set.source.name(index) for batch in pieces for index in batch.used]
    images = [name for names in run.ranks.gather(mine) for name in names]
    path = run.folder / "not_finite.json"
    report = {"what": what, "value": str(value), "epoch": run.epoch, "step": run.step, "lr": run.rate, "images": images}
    if run.ranks.first:
        with writing(path):
            path.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return UserError(
        f"{what} is {value} at {run.task.place(run)[0]} (learning rate {run.rate:g}); nothing was "
        f"updated; the batch's images are listed in {path}; try a lower --optim.lr or --run.amp off"
    )


def report_bad(run: Run, log: Log, pieces: list) -> None:
    """Name the images that were skipped."""
    for line in (line for batch in pieces for line in run.bad.note(batch)):
        log.say(line)


def report(run: Run, log: Log, pace: Pace, loss: float, norm: float, rate: float) -> None:
    """Log an update."""
    speed, bad = pace.images_per_second, len(run.bad.seen)
    shown = norm if math.isfinite(norm) else None
    values = {"epoch": run.epoch + 1, "loss": loss, "lr": rate, "grad_norm": shown, "images_per_s": speed}
    log.record("train", run.done, **values, bad_images=bad)
    if log.bar.disable:
        place, goal = run.task.place(run)
        log.say(f"{place} of {goal}: loss {loss:.3f} lr {rate:.2e} {speed:.1f} images/s, {pace.time_left} left")


def judge(run: Run, log: Log) -> None:
    """Evaluate the weights, and the averaged ones where there are some; keep the best."""
    networks = {"": run.model} | ({"ema_": run.ema.module} if run.ema else {})
    values, alone = {}, run.ranks.size == 1
    for prefix, network in networks.items():
        result = run.task.evaluate(run, network, log.say, lambda: alone and run.stop.signal is not None)
        if run.ranks.sums([run.stop.signal is not None])[0]:
            leave(run)
        values |= {prefix + name: value for name, value in result.items()}
        score = run.task.score(result)
        if prefix or not run.ema:
            better = score >= run.best
            run.best = max(run.best, score)
            if better:
                run.save_best(network)
    run.last = values
    log.record("eval", run.done, epoch=run.epoch + 1, **values)
    log.say(f"{run.task.place(run)[0]}: {run.task.describe_scores(values, run.best)}")


def leave(run: Run) -> None:
    """Save and stop, saying how to go on."""
    run.save()
    raise stopped(run, f"at {' of '.join(map(str, run.task.place(run)))}, and saved {run.folder / LAST}")


def stop_at_once(run: Run) -> Interrupted:
    """Say what is kept of a run that could not save any more."""
    kept = [path for path in (run.folder / LAST, run.folder / PREVIOUS) if path.is_file()]
    if not kept:
        return Interrupted("\nstopped at once: no checkpoint was written yet")
    return stopped(run, f"at once, without saving; {kept[0]} is kept")


def stopped(run: Run, how: str) -> Interrupted:
    """Say how a run was stopped and how to go on; only the first rank speaks."""
    advice = f"to go on: python -m {run.task.command} with the same config and options, and --resume"
    return Interrupted(f"\nstopped {how}; {advice}" if run.ranks.first else "")
