"""A training run: everything that takes part in it, and everything that survives it."""

import signal
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import nn

from ..common.distributed import Ranks
from ..common.errors import UserError, one_line
from ..config.section import Section
from ..data.loader import BadImages
from ..data.sampler import accumulation_steps
from ..models.checkpoint import BEST, LAST, RESUMED, read_file, write_file
from ..models.weights import known_classes, load_strictly, other_classes
from ..tasks.task import Task
from .layers import freeze
from .optimizer import build_optimizer
from .progress import build_progress
from .scheduler import build_scheduler
from .state import random_states, seed_everything, set_batch_norm, set_optimizer, set_random_states


@dataclass
class Stop:
    """Whether someone asked the run to stop."""

    signal: int | None = None

    @contextmanager
    def listening(self):
        """Take note of Ctrl-C and SIGTERM for a while; a second Ctrl-C acts at once."""
        saved = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in saved.items():
                signal.signal(number, handler)

    def note(self, number, frame) -> None:
        """Remember a signal; of SIGTERM, which Slurm and torchrun both send, any number is one."""
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)


@dataclass
class Run:
    """A training run and where it is.

    Parameters
    ----------
    config : Section
        A Config of the task's kind.
    ranks : Ranks
    task : Task

    Attributes
    ----------
    epoch, step : int
        Epochs done, and steps done in the next one.
    best : float
        Best score so far.
    owed : bool
        Whether the evaluation that belongs after the last step is still to be made.
    last : dict
        The last evaluation's numbers, as in log.jsonl.
    notes : list of str
        What the user should know of the checkpoint that was gone on from.
    """

    config: Section
    ranks: Ranks
    task: Task
    epoch: int = 0
    step: int = 0
    best: float = 0.0
    owed: bool = False
    last: dict = field(default_factory=dict)
    stop: Stop = field(default_factory=Stop)
    notes: list = field(default_factory=list)

    def __post_init__(self):
        config, ranks = self.config, self.ranks
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        self.train_set, self.val_set = self.task.datasets()
        self.accumulation, self.progress = accumulation_steps(config, ranks), build_progress(config, self.train_set)
        seed_everything(config.run.seed, 0)
        model = self.task.model(self.train_set)
        self.model = set_batch_norm(model, config.run.batch_norm, ranks).to(ranks.device)
        freeze(self.model, config.optim.freeze)
        seed_everything(config.run.seed, ranks.rank)
        self.ema = ModelEmaV3(self.model, config.run.ema) if config.run.ema else None
        self.optimizer = build_optimizer(self.model, config)
        self.scheduler = build_scheduler(self.optimizer, config, self.progress.epoch_steps)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.run.amp == "fp16")
        self.bad = BadImages(self.train_set)
        compiled = torch.compile(self.model, fullgraph=True) if config.run.compile else self.model
        self.forward = ranks.wrap(compiled)

    @property
    def done(self) -> int:
        """Updates done since the run began."""
        return self.progress.done(self.epoch, self.step)

    @property
    def total(self) -> int:
        """Updates of the whole run."""
        return self.progress.total

    @property
    def place(self) -> tuple[str, int]:
        """Where the run is, as "epoch 1, step 5", and of how many steps that is."""
        return self.progress.place(self.epoch, self.step)

    @property
    def at_end(self) -> bool:
        """Whether all steps of the epoch are made."""
        return self.step == self.progress.epoch_steps or self.done == self.total

    @property
    def folder(self) -> Path:
        """Where checkpoints and logs go."""
        return Path(self.config.run.output)

    @property
    def rate(self) -> float:
        """Learning rate of the next step: the highest, where parts of the network learn at different ones."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def state(self) -> dict:
        """Collect all that going on needs; every rank must call it."""
        return self.where() | {
            "best": self.best,
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": self.ranks.gather(random_states()),
        }

    def where(self) -> dict:
        """Return what a checkpoint is, of which run, and from when."""
        config = self.config.model_dump(mode="json")
        place = {"kind": self.task.kind, "config": config, "epoch": self.epoch, "step": self.step, "owed": self.owed}
        place["images"] = len(self.train_set)
        place |= self.progress.checkpoint_fields(self.epoch, self.step)
        return place | self.task.checkpoint_fields(self.val_set)

    def save(self) -> None:
        """Write last.pt."""
        state = self.state()
        if self.ranks.first:
            write_file(self.folder / LAST, state)

    def save_best(self, model: nn.Module, averaged: bool) -> None:
        """Write best.pt: the weights that scored, averaged or not, without what only going on needs."""
        if self.ranks.first:
            weights = {"best": self.best, "averaged": averaged, "model": model.state_dict(), "ema": None}
            write_file(self.folder / BEST, self.where() | weights)

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises
        ------
        UserError
            Damaged, of another network, or further than this run goes.
        """
        state = read_file(path, self.task.kind)
        if "optimizer" not in state:
            raise UserError(f"{path} holds weights only: resume from {LAST}, or start from it by --model.init {path}")
        state = read_file(path, self.task.kind, (*RESUMED, *self.progress.needs, *self.task.needs))
        self.check_classes(state, path)
        self.check_layers(state["config"].get("optim", {}), path)
        load_strictly(self.model, state["model"], path)
        if self.ema and state["ema"]:
            load_strictly(self.ema.module, state["ema"], path)
        groups = self.optimizer.param_groups
        settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        try:
            set_optimizer(self.optimizer, state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            if self.ranks.rank < len(state["random"]):
                set_random_states(state["random"][self.ranks.rank])
        except (UserError, RuntimeError, KeyError, TypeError) as error:
            raise UserError(f"{path}: {one_line(error)}") from error
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)  # weight decay and the like are as the config says now
        self.best, self.owed = state["best"], state.get("owed", False)
        then, now = state.get("images"), len(self.train_set)
        if then not in (None, now):
            self.notes.append(
                f"{path} was trained on {then:,} images, and there are {now:,} now: their order is another"
            )
        self.epoch, self.step = self.progress.restore(state)
        steps = self.progress.epoch_steps
        if self.step > steps or self.epoch * steps + self.step > self.total:
            raise UserError(
                f"{path} was saved at {self.place[0]}, but there are {steps} steps in an epoch and "
                f"{self.total} in all now: go on with as many images, the same --run.total_batch and as long a "
                f"schedule, or start from its weights by --model.init {path}"
            )
        if self.owed and not self.step and self.epoch:  # the evaluation at an epoch's end comes before the next epoch
            self.epoch, self.step = self.epoch - 1, steps
        self.scheduler.step_update(self.done)  # the schedule has no memory: steps done and the config say all

    def check_classes(self, state: dict, path: Path) -> None:
        """Refuse the checkpoint of a run whose data had other classes, or numbered them differently."""
        known, wanted = known_classes(state), self.train_set.class_names
        if known and wanted and known != wanted:
            raise other_classes(path, known, wanted, "go on with the same data, or start anew from --model.init")

    def check_layers(self, saved: dict, path: Path) -> None:
        """Refuse the optimiser of a run that trained other parameters, or grouped them differently."""
        now = self.config.optim
        frozen, decay = saved.get("freeze", []), saved.get("layer_decay")
        if frozen != now.freeze or (decay is None) != (now.layer_decay is None):
            then = f"optim.freeze {frozen} and optim.layer_decay {decay}, not {now.freeze} and {now.layer_decay}"
            raise UserError(f"{path} was trained with {then}: go on so, or start from it by --model.init {path}")
