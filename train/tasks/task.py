"""What a kind of training brings: its data, network, loss and evaluation. It does not know the run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..common.distributed import Ranks
from ..config.section import Section
from ..data.classification_dataset import ImageDataset


class Task(ABC):
    """A kind of training: :class:`train.tasks.classification.Classification` or a segmenter's.

    Parameters
    ----------
    config : Section
        Of ``config_type``.

    Attributes
    ----------
    kind : str
        What its checkpoints call themselves.
    command : str
        The command that trains it, as in ``python -m command``.
    config_type : type
        The sections of its configs.
    metric_name : str
        The value of an evaluation by which the best weights are kept.
    shown : tuple of str
        The values of an evaluation that are printed.
    percent : float
        What makes percents of them.
    needs : tuple of str
        Fields that its checkpoints must have besides those that all have.
    """

    kind: str
    command: str
    config_type: type[Section]
    metric_name: str
    shown: tuple[str, ...]
    percent: float = 1.0
    needs: tuple[str, ...] = ()

    def __init__(self, config: Section):
        self.config = config

    @abstractmethod
    def datasets(self) -> tuple[ImageDataset, ImageDataset]:
        """Open the training and validation images; what the config leaves to the data is filled in."""

    @abstractmethod
    def model(self, train_set: ImageDataset) -> nn.Module:
        """Create the network with the weights that it starts from."""

    def counts(self, batch) -> list[float]:
        """Return what the loss divides by, counted in a batch; summed over all batches of a step before ``loss``."""
        return []

    def targets(self, batch) -> tuple[torch.Tensor, Any]:
        """Return the network's input and what the loss compares its output with, of a batch on the device."""
        return batch.images, batch

    @abstractmethod
    def loss(self, output, targets, step: int, counts: list[float]) -> torch.Tensor:
        """Compute the loss of a batch, outside autocast.

        Parameters
        ----------
        output : object
            The network's.
        targets : object
            As ``targets`` returns them.
        step : int
            Steps done before this one.
        counts : list of float
            Mean of ``counts`` over the batches of the step, on all ranks.

        Returns
        -------
        Tensor
            float32, without dimensions.
        """

    @abstractmethod
    def evaluate(
        self,
        model: nn.Module,
        samples: ImageDataset,
        ranks: Ranks,
        say: Callable[[str], None],
        stop: Callable[[], bool],
    ) -> dict:
        """Compute the scores of a network on validation images; none if stopped or if no image could be read."""

    @abstractmethod
    def checkpoint_fields(self, samples: ImageDataset) -> dict:
        """Return what a checkpoint must say of the data besides its config and weights, as plain containers."""
