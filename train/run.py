"""A training run: everything that takes part in it, and everything that survives it."""

import signal
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import nn

from .batches import BadImages, accumulation, updates_per_epoch
from .build import build_loss, build_model, build_optimizer, build_scheduler, seed_everything, set_batch_norm
from .checkpoint import BEST, KIND, LAST, random_states, read_file, set_random_states, write_file
from .config import Config
from .data import check_classes, open_samples
from .distributed import Ranks
from .errors import UserError
from .weights import load_strictly


@dataclass
class Stop:
    """Whether someone asked the run to stop."""

    signal: int | None = None

    @contextmanager
    def listening(self):
        """Take note of Ctrl-C and SIGTERM for a while; a second one acts at once."""
        saved = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in saved.items():
                signal.signal(number, handler)

    def note(self, number, frame) -> None:
        """Remember a signal and make its next one act as usual."""
        self.signal = number
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@dataclass
class Run:
    """A training run and where it is.

    Parameters
    ----------
    config : Config
    ranks : Ranks

    Attributes
    ----------
    epoch, step : int
        Epochs done, and updates done in the next one.
    best : float
        Best top-1 so far, 0..1.
    last : dict
        The last evaluation's numbers, as in log.jsonl.
    """

    config: Config
    ranks: Ranks
    epoch: int = 0
    step: int = 0
    best: float = 0.0
    last: dict = field(default_factory=dict)
    stop: Stop = field(default_factory=Stop)

    def __post_init__(self):
        config, ranks = self.config, self.ranks
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        self.train_set, self.val_set = open_samples(config, "train"), open_samples(config, "val")
        check_classes(self.train_set.source, self.val_set.source)
        self.pieces, self.updates = accumulation(config, ranks), updates_per_epoch(self.train_set, config)
        seed_everything(config.run.seed, 0)
        self.model = set_batch_norm(build_model(config), config.run.batch_norm, ranks).to(ranks.device)
        seed_everything(config.run.seed, ranks.rank)
        self.ema = ModelEmaV3(self.model, config.run.ema) if config.run.ema else None
        self.optimizer = build_optimizer(self.model, config)
        self.scheduler = build_scheduler(self.optimizer, config, self.updates)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.run.amp == "fp16")
        self.mixup, self.loss = build_loss(config.augment, config.model.num_classes)
        self.bad = BadImages(self.train_set)
        compiled = torch.compile(self.model) if config.run.compile else self.model
        self.forward = ranks.wrap(compiled)

    @property
    def done(self) -> int:
        """Updates done since the run began."""
        return self.epoch * self.updates + self.step

    @property
    def folder(self) -> Path:
        """Where checkpoints and logs go."""
        return Path(self.config.run.output)

    @property
    def rate(self) -> float:
        """Learning rate of the next update."""
        return self.optimizer.param_groups[0]["lr"]

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
        """Say what a checkpoint is, of which run, and from when."""
        config = self.config.model_dump(mode="json")
        return {"kind": KIND, "config": config, "epoch": self.epoch, "step": self.step}

    def save(self) -> None:
        """Write last.pt."""
        state = self.state()
        if self.ranks.first:
            write_file(self.folder / LAST, state)

    def save_best(self, model: nn.Module) -> None:
        """Write best.pt: the weights that scored, without what only going on needs."""
        if self.ranks.first:
            weights = {"best": self.best, "model": model.state_dict(), "ema": None}
            write_file(self.folder / BEST, self.where() | weights)

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint."""
        state = read_file(path)
        if "optimizer" not in state:
            raise UserError(f"{path} holds weights only: resume from {LAST}, or start from it by --model.init {path}")
        load_strictly(self.model, state["model"], path)
        if self.ema and state["ema"]:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]
        self.scheduler.step_update(self.done)  # the schedule has no memory: updates done and the config say all
        if self.ranks.rank < len(state["random"]):
            set_random_states(state["random"][self.ranks.rank])
