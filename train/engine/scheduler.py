"""The learning rate's schedule, by timm, set at every step: cosine over epochs, or poly or falls over steps."""

import torch
from timm.scheduler import MultiStepLRScheduler, PolyLRScheduler, create_scheduler_v2
from timm.scheduler.scheduler import Scheduler

from ..config import segmentation
from ..config.section import Section


def build_scheduler(optimizer: torch.optim.Optimizer, config: Section, epoch_steps: int) -> Scheduler:
    """Create the schedule that a config names.

    Parameters
    ----------
    optimizer : Optimizer
    config : Config
        Of a classifier or a segmenter.
    epoch_steps : int
        Steps of an epoch, by which a classifier's schedule is counted.

    Returns
    -------
    Scheduler
        Set by ``step_update(steps done)``.
    """
    if isinstance(config.schedule, segmentation.Schedule):
        return step_schedule(optimizer, config.schedule)
    return cosine_schedule(optimizer, config.schedule, epoch_steps)


def cosine_schedule(optimizer: torch.optim.Optimizer, schedule: Section, epoch_steps: int) -> Scheduler:
    """Create the cosine schedule: linear warm-up to the peak, then half a cosine to ``min_lr`` at the very end."""
    warmup = min(schedule.warmup_epochs, schedule.epochs - 1)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=schedule.epochs - warmup,
        warmup_epochs=warmup,
        warmup_prefix=True,
        warmup_lr=schedule.warmup_lr,
        min_lr=schedule.min_lr,
        step_on_epochs=False,
        updates_per_epoch=epoch_steps,
    )
    return scheduler


def step_schedule(optimizer: torch.optim.Optimizer, schedule: segmentation.Schedule) -> Scheduler:
    """Create the poly schedule, or that of falls, after a warm-up if there is one.

    Falls are counted from the run's first step. timm lets a fall act one step early, which is put right here.
    """
    warmup = {"warmup_t": schedule.warmup_steps, "warmup_lr_init": schedule.warmup_lr, "t_in_epochs": False}
    if schedule.kind == "steps":
        late = [step + 1 for step in schedule.steps]
        return MultiStepLRScheduler(optimizer, late, schedule.factor, warmup_prefix=False, **warmup)
    rest = max(1, schedule.max_steps - schedule.warmup_steps)
    return PolyLRScheduler(optimizer, rest, schedule.power, lr_min=0.0, warmup_prefix=True, **warmup)
