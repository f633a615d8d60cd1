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

from .batches import TrainKeys, grouped, load
from .build import peak_rate, set_training
from .checkpoint import LAST
from .config import Config
from .data import Batch
from .distributed import Ranks
from .errors import Interrupted, UserError
from .evaluation import autocast, evaluate
from .log import Log, Pace
from .run import Run


def train(config: Config, resume: Path | None = None) -> Run:
    """Train and evaluate as a config says.

    Parameters
    ----------
    config : Config
    resume : Path, optional
        Checkpoint to go on from.

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
        run = Run(config, ranks)
        if resume:
            run.restore(resume)
        log = Log(run.folder, ranks.first, config.run.tensorboard, run.done)
        introduce(run, log, resume)
        with run.stop.listening():
            fit(run, log)
        log.close()
        return run
    finally:
        ranks.close()


def introduce(run: Run, log: Log, resume: Path | None) -> None:
    """Say what is about to be trained, and how the learning rate and the batch came about."""
    config, section = run.config, run.config.run
    size = sum(parameter.numel() for parameter in run.model.parameters())
    log.say(f"{config.model.name}: {size:,} parameters on {run.ranks.device}, {run.ranks.size} process(es)")
    classes = config.model.num_classes
    log.say(f"{len(run.train_set):,} training and {len(run.val_set):,} validation images, {classes} classes")
    log.say(
        f"total batch {section.total_batch} = {section.batch_size} x {run.ranks.size} process(es) x {run.pieces} "
        f"piece(s); {peak_rate(config)[1]}; {config.schedule.epochs} epochs of {run.updates} updates"
    )
    if resume:
        log.say(f"resumed {resume} at epoch {run.epoch + 1}, update {run.step} of {run.updates}")
    log.record("run", run.done, config=config.model_dump(mode="json"), resumed=str(resume) if resume else None)


def fit(run: Run, log: Log) -> None:
    """Train the epochs that are left, evaluating and saving after each."""
    schedule, every = run.config.schedule, run.config.run.eval_every
    pace = Pace(schedule.epochs * run.updates - run.done, run.config.run.total_batch)
    while run.epoch < schedule.epochs:
        pace.resume()
        train_epoch(run, log, pace)
        pace.pause()
        if (run.epoch + 1) % every == 0 or run.epoch + 1 == schedule.epochs:
            judge(run, log)
        run.epoch, run.step = run.epoch + 1, 0
        run.save()


def train_epoch(run: Run, log: Log, pace: Pace) -> None:
    """Make the updates that are left of an epoch."""
    section = run.config.run
    keys = TrainKeys(run.train_set, run.config, run.ranks, run.epoch, run.step)
    set_training(run.model, section.batch_norm)
    log.start_epoch(run.epoch, run.config.schedule.epochs, run.updates, run.step)
    cuda = run.ranks.device.type == "cuda"
    for pieces in grouped(load(run.train_set, keys, run.config, cuda), run.pieces):
        report_bad(run, log, pieces)
        rate = run.rate
        loss, norm, stopped = update(run, pieces)
        run.step += 1
        pace.step()
        log.advance(loss=f"{loss:.3f}", lr=f"{rate:.2e}", images_s=f"{pace.images_per_second:.0f}", left=pace.time_left)
        if run.done % section.log_every == 0 or run.step == run.updates:
            report(run, log, pace, loss, norm, rate)
        if stopped:
            leave(run)
        if run.done % section.save_every == 0:
            run.save()
    log.end_epoch()


def update(run: Run, pieces: list[Batch]) -> tuple[float, float, bool]:
    """Make one update of the weights.

    Parameters
    ----------
    run : Run
    pieces : list of Batch
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
    for number, batch in enumerate(pieces, start=1):
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


def piece_loss(run: Run, batch: Batch) -> torch.Tensor:
    """Compute the mean loss of a piece of the batch."""
    images, labels = (tensor.to(run.ranks.device, non_blocking=True) for tensor in (batch.images, batch.labels))
    if run.mixup:
        images, labels = run.mixup(images, labels)
    with autocast(run.config, run.ranks):
        logits = run.forward(images)
    return run.loss(logits.float(), labels)


def not_finite(run: Run, what: str, value: float, pieces: list[Batch]) -> UserError:
    """Save which images met a loss or gradient that is not finite; every rank must call it."""
    mine = [run.train_set.source.name(index) for batch in pieces for index in batch.used]
    images = [name for names in run.ranks.gather(mine) for name in names]
    path = run.folder / "not_finite.json"
    report = {"what": what, "value": str(value), "epoch": run.epoch, "step": run.step, "lr": run.rate, "images": images}
    if run.ranks.first:
        path.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return UserError(
        f"{what} is {value} at epoch {run.epoch + 1}, update {run.step} (learning rate {run.rate:g}); nothing was "
        f"updated; the batch's images are listed in {path}; try a lower --optim.lr or --run.amp off"
    )


def report_bad(run: Run, log: Log, pieces: list[Batch]) -> None:
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
        log.say(
            f"epoch {run.epoch + 1}/{run.config.schedule.epochs} update {run.step}/{run.updates} loss {loss:.3f} "
            f"lr {rate:.2e} {speed:.0f} images/s, {pace.time_left} left"
        )


def judge(run: Run, log: Log) -> None:
    """Evaluate the weights, and the averaged ones where there are some; keep the best."""
    networks = {"": run.model} | ({"ema_": run.ema.module} if run.ema else {})
    values, alone = {}, run.ranks.size == 1
    for prefix, network in networks.items():
        result = evaluate(network, run.val_set, run.config, run.ranks, log.say, lambda: alone and run.stop.signal)
        if run.ranks.sums([run.stop.signal is not None])[0]:
            leave(run)
        values |= {prefix + name: value for name, value in result.items()}
        top1 = result.get("top1", 0.0)
        if prefix or not run.ema:
            better = top1 >= run.best
            run.best = max(run.best, top1)
            if better:
                run.save_best(network)
    run.last = values
    log.record("eval", run.done, epoch=run.epoch + 1, **values)
    shown = ", ".join(f"{name} {100 * values[name]:.2f} %" for name in values if name.endswith(("top1", "top5")))
    log.say(f"epoch {run.epoch + 1}: {shown or 'no validation image could be read'}; best top1 {100 * run.best:.2f} %")


def leave(run: Run) -> None:
    """Save and stop, saying how to go on."""
    run.save()
    raise Interrupted(
        f"\nstopped at epoch {run.epoch + 1}, update {run.step} of {run.updates}, and saved {run.folder / LAST}; "
        f"to go on: python -m train.classify with the same config and options, and --resume"
    )
