"""What a kind of training brings to the common machinery: its data, network, schedule, loss and judges."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..config.section import Section
from ..data.classification_dataset import Samples

if TYPE_CHECKING:
    from ..engine.run import Run


class Task(ABC):
    """A kind of training: :class:`train.tasks.classification.Classification` or a segmenter's.

    Attributes
    ----------
    kind : str
        What its checkpoints call themselves.
    command : str
        The command that trains it, as in ``python -m command``.
    needs : tuple of str
        Fields that its checkpoints must have besides those that all have.
    """

    kind: str
    command: str
    needs: tuple[str, ...] = ()

    @abstractmethod
    def open_sets(self, config: Section) -> tuple[Samples, Samples]:
        """Open the training and validation images."""

    @abstractmethod
    def build_model(self, config: Section, train_set: Samples) -> nn.Module:
        """Make the network with the weights that it starts from."""

    @abstractmethod
    def build_optimizer(self, model: nn.Module, config: Section) -> torch.optim.Optimizer:
        """Make the optimiser."""

    @abstractmethod
    def peak_rate(self, config: Section) -> tuple[float, str]:
        """Give the peak learning rate, and the arithmetic that led to it in words."""

    @abstractmethod
    def build_scheduler(self, optimizer: torch.optim.Optimizer, config: Section, updates: int):
        """Make one of timm's schedules, counted in updates; ``updates`` make an epoch."""

    @abstractmethod
    def epoch_length(self, config: Section, train_set: Samples) -> int:
        """Give the updates of an epoch; its end is where evaluations are."""

    def epochs_between(self, config: Section) -> int:
        """Give the epochs from one evaluation to the next."""
        return 1

    @abstractmethod
    def total_updates(self, config: Section, updates: int) -> int:
        """Give the updates of a whole run, ``updates`` being an epoch's."""

    @abstractmethod
    def keys(self, run: Run):
        """Give the (epoch, image) keys of this rank's batches that are left of the run's epoch."""

    @abstractmethod
    def describe_plan(self, run: Run) -> list[str]:
        """Say in a line or two what will be trained on and for how long."""

    @abstractmethod
    def place(self, run: Run) -> tuple[str, int]:
        """Say where a run is, as "epoch 1, update 5", and of how many updates that is."""

    def restore_place(self, run: Run, state: dict) -> tuple[int, int]:
        """Give the epochs done and updates done in the next one of a checkpoint."""
        return state["epoch"], state["step"]

    def facts(self, run: Run) -> dict:
        """What a checkpoint must say besides its config and weights, as plain containers."""
        return {}

    @abstractmethod
    def check_classes(self, run: Run, state: dict, path: Path) -> None:
        """Refuse to go on from the checkpoint of a run whose data had other classes, or numbered them differently."""

    def share(self, run: Run, pieces: list) -> list:
        """Tell the pieces of an update what they must know of each other; every rank calls it."""
        return pieces

    @abstractmethod
    def targets(self, run: Run, batch) -> tuple[torch.Tensor, Any]:
        """Give a batch's images, and what the loss compares with the network's output, on the run's device."""

    @abstractmethod
    def loss(self, run: Run, output, targets) -> torch.Tensor:
        """Give the loss of a piece of a batch; called outside autocast."""

    @abstractmethod
    def evaluate(self, run: Run, model: nn.Module, say: Callable[[str], None], stop: Callable[[], bool]) -> dict:
        """Judge a network on the validation images; no numbers if stopped or if no image could be read."""

    @abstractmethod
    def score(self, values: dict) -> float:
        """Choose from an evaluation the number by which the best weights are kept."""

    @abstractmethod
    def describe_scores(self, values: dict, best: float) -> str:
        """Put an evaluation (the averaged weights' numbers start with ema_) and the best score into words."""
