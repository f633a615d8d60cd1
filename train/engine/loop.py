"""The loop: read batches, step, log, save; and stop cleanly when asked to.

One step:    for each batch of the step   ->  forward under autocast, loss / batches, backward
             mean loss over ranks, finite? ->  unscale, clip, step, schedule, averaged weights
"""

import json
import math
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from ..common.distributed import Ranks
from ..common.errors import Interrupted, UserError
from ..common.output_files import Outputs
from ..config.section import Section
from ..data.loader import grouped, load
from ..models.autocast import autocast
from ..models.checkpoint import LAST, PREVIOUS
from ..tasks.classification import Classification
from ..tasks.task import Task
from .log import Log, Pace
from .report import describe_scores, introduce, report, report_bad
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
        evaluate(run, log)
        run.owed = False
    if run.at_end:
        run.epoch, run.step = run.epoch + 1, 0
    run.save()


def train_epoch(run: Run, log: Log, pace: Pace) -> None:
    """Make the steps that are left of an epoch."""
    section, every = run.config.run, run.progress.epochs_between
    sampler = run.progress.sampler(run.ranks, run.epoch, run.step)
    set_training(run.model, section.batch_norm)
    log.start_bar(*run.place, run.step)
    cuda = run.ranks.device.type == "cuda"
    for batches in grouped(load(run.train_set, sampler, run.config, cuda), run.accumulation):
        report_bad(run, log, batches)
        rate = run.rate
        loss, norm, stopped = train_step(run, batches)
        run.step += 1
        run.owed = run.at_end and ((run.epoch + 1) % every == 0 or run.done == run.total)
        pace.step()
        log.advance(loss=f"{loss:.3f}", lr=f"{rate:.2e}", images_s=f"{pace.images_per_second:.1f}", left=pace.time_left)
        if run.done % section.log_every == 0 or run.step == run.progress.epoch_steps or run.done == run.total:
            report(run, log, pace, loss, norm, rate)
        if stopped:
            leave(run)
        if run.done % section.save_every == 0 or run.owed:
            run.save()
    log.end_bar()


def train_step(run: Run, batches: list) -> tuple[float, float, bool]:
    """Make one step: backward over all batches, clip, update the weights.

    Parameters
    ----------
    run : Run
    batches : list of batches
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
    total, counts = torch.zeros((), device=run.ranks.device), mean_counts(run, batches)
    for number, batch in enumerate(batches, start=1):
        last = number == len(batches)
        with nullcontext() if last or run.ranks.size == 1 else run.forward.no_sync():
            loss = batch_loss(run, batch, counts) / len(batches)
            run.scaler.scale(loss).backward()
        total += loss.detach()
    mean, stop = run.ranks.sums([total.item() / run.ranks.size, run.stop.signal is not None])
    if not math.isfinite(mean):
        raise not_finite(run, "loss", mean, batches)
    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.config.optim.clip).item()
    if not math.isfinite(norm) and not run.scaler.is_enabled():
        raise not_finite(run, "gradient norm", norm, batches)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    run.scheduler.step_update(run.done + 1)
    if run.ema:
        run.ema.update(run.model, run.done)
    return mean, norm, stop > 0


def mean_counts(run: Run, batches: list) -> list[float]:
    """Compute the mean over all ranks' batches of what the task counts in each; every rank must call it."""
    counts = [sum(values) for values in zip(*map(run.task.counts, batches), strict=True)]
    return [total / (len(batches) * run.ranks.size) for total in run.ranks.sums(counts)] if counts else []


def batch_loss(run: Run, batch, counts: list[float]) -> torch.Tensor:
    """Compute the mean loss of a batch."""
    images, targets = run.task.targets(batch.to(run.ranks.device))
    with autocast(run.config, run.ranks):
        output = run.forward(images)
    return run.task.loss(output, targets, run.done, counts)


def not_finite(run: Run, what: str, value: float, batches: list) -> UserError:
    """Save which images met a loss or gradient that is not finite; every rank must call it."""
    mine = [run.train_set.source.name(index) for batch in batches for index in batch.used]
    images = [name for names in run.ranks.gather(mine) for name in names]
    path = run.folder / "not_finite.json"
    listed = f"are listed in {path}"
    report = {"what": what, "value": str(value), "epoch": run.epoch, "step": run.step, "lr": run.rate, "images": images}
    if run.ranks.first:
        try:
            Outputs(run.folder).write(path.name, json.dumps(report, indent=1).encode())
        except UserError as error:
            listed = f"were {', '.join(images)} ({error})"
    return UserError(
        f"{what} is {value} at {run.place[0]} (learning rate {run.rate:g}); nothing was "
        f"updated; the batch's images {listed}; try a lower --optim.lr or --run.amp off"
    )


def evaluate(run: Run, log: Log) -> None:
    """Evaluate the weights, and the averaged ones where there are some; keep whichever score best."""
    networks = {"": run.model} | ({"ema_": run.ema.module} if run.ema else {})
    values, alone = {}, run.ranks.size == 1
    for prefix, network in networks.items():
        result = run.task.evaluate(
            network, run.val_set, run.ranks, log.say, lambda: alone and run.stop.signal is not None
        )
        if run.ranks.sums([run.stop.signal is not None])[0]:
            leave(run)
        values |= {prefix + name: value for name, value in result.items()}
        score = result.get(run.task.metric_name) or 0.0
        if score >= run.best:
            run.best = score
            run.save_best(network, averaged=bool(prefix))
    run.last = values
    log.record("eval", run.done, epoch=run.epoch + 1, **values)
    log.say(f"{run.place[0]}: {describe_scores(run.task, values, run.best)}")


def leave(run: Run) -> None:
    """Save and stop, saying how to go on."""
    run.save()
    raise stopped(run, f"at {' of '.join(map(str, run.place))}, and saved {run.folder / LAST}")


def stop_at_once(run: Run) -> Interrupted:
    """Describe what is kept of a run that could not save any more."""
    kept = [path for path in (run.folder / LAST, run.folder / PREVIOUS) if path.is_file()]
    if not kept:
        return Interrupted("\nstopped at once: no checkpoint was written yet")
    return stopped(run, f"at once, without saving; {kept[0]} is kept")


def stopped(run: Run, how: str) -> Interrupted:
    """Describe how a run was stopped and how to go on; only the first rank speaks."""
    advice = f"to go on: python -m {run.task.command} with the same config and options, and --resume"
    return Interrupted(f"\nstopped {how}; {advice}" if run.ranks.first else "")
