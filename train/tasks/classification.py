"""Classification as a task of the common machinery."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ..config.classification import Config
from ..data.classification import check_classes, open_samples, open_source
from ..data.classification_dataset import Batch, Samples
from ..data.sampler import TrainKeys, updates_per_epoch
from ..engine.run import Run
from ..metrics.classification import evaluate
from ..models.checkpoint import KIND
from ..models.classifier import build_loss, build_model, build_optimizer, build_scheduler, peak_rate
from ..models.weights import other_classes
from .task import Task


def class_names(samples: Samples) -> list[str] | None:
    """Give the names of the classes in the order of their numbers; None where the data have numbers only."""
    names = getattr(samples.source, "classes", None)
    return list(names) if names else None


class Classification(Task):
    """Images with one label each; epochs are passes over the training images.

    Parameters
    ----------
    config : Config
    """

    kind, command = KIND, "train.classify"

    def __init__(self, config: Config):
        self.mixup, self.criterion = build_loss(config.augment, config.model.num_classes)

    def open_sets(self, config: Config) -> tuple[Samples, Samples]:
        """Open the images, whose classes must be those of the config."""
        sources = {split: open_source(config, split) for split in ("train", "val")}
        check_classes(*sources.values())
        train_set, val_set = (open_samples(config, split, source) for split, source in sources.items())
        return train_set, val_set

    def build_model(self, config: Config, train_set: Samples) -> nn.Module:
        """Make the config's network."""
        return build_model(config, class_names(train_set))

    def build_optimizer(self, model: nn.Module, config: Config) -> torch.optim.Optimizer:
        """Make AdamW."""
        return build_optimizer(model, config)

    def peak_rate(self, config: Config) -> tuple[float, str]:
        """Give the peak learning rate for the config's batch."""
        return peak_rate(config)

    def build_scheduler(self, optimizer: torch.optim.Optimizer, config: Config, updates: int):
        """Make the cosine schedule."""
        return build_scheduler(optimizer, config, updates)

    def epoch_length(self, config: Config, train_set: Samples) -> int:
        """Count the whole batches of a pass."""
        return updates_per_epoch(train_set, config)

    def epochs_between(self, config: Config) -> int:
        """Evaluate as often as the config says."""
        return config.run.eval_every

    def total_updates(self, config: Config, updates: int) -> int:
        """Count the updates of all epochs."""
        return config.schedule.epochs * updates

    def keys(self, run: Run) -> TrainKeys:
        """Give the keys of the batches left of the pass."""
        return TrainKeys(run.train_set, run.config, run.ranks, run.epoch, run.step)

    def describe_plan(self, run: Run) -> list[str]:
        """Say how many images, classes and epochs there are."""
        counts = f"{len(run.train_set):,} training and {len(run.val_set):,} validation images"
        epochs = f"{run.config.schedule.epochs} epochs of {run.updates} updates"
        return [f"{counts}, {run.config.model.num_classes} classes; {epochs}"]

    def place(self, run: Run) -> tuple[str, int]:
        """Count updates within the epoch."""
        return f"epoch {run.epoch + 1}, update {run.step}", run.updates

    def facts(self, run: Run) -> dict:
        """Keep the names of the classes, where the data have any."""
        return {"classes": class_names(run.train_set)}

    def check_classes(self, run: Run, state: dict, path: Path) -> None:
        """Refuse other names, or the same in another order."""
        known, wanted = state.get("classes"), class_names(run.train_set)
        if known and wanted and known != wanted:
            raise other_classes(path, known, wanted, "go on with the same data, or start anew from --model.init")

    def targets(self, run: Run, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Move images and labels to the device, and mix them."""
        images, labels = (tensor.to(run.ranks.device, non_blocking=True) for tensor in (batch.images, batch.labels))
        return self.mixup(images, labels) if self.mixup else (images, labels)

    def loss(self, run: Run, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Give the mean cross entropy."""
        return self.criterion(output.float(), targets)

    def evaluate(self, run: Run, model: nn.Module, say: Callable[[str], None], stop: Callable[[], bool]) -> dict:
        """Measure top-1 and top-5."""
        return evaluate(model, run.val_set, run.config, run.ranks, say, stop)

    def score(self, values: dict) -> float:
        """Choose top-1, 0..1."""
        return values.get("top1", 0.0)

    def describe_scores(self, values: dict, best: float) -> str:
        """Name top-1 and top-5 in percent."""
        shown = ", ".join(f"{name} {100 * values[name]:.2f} %" for name in values if name.endswith(("top1", "top5")))
        return f"{shown or 'no validation image could be read'}; best top1 {100 * best:.2f} %"
