"""Classification: images with one label each."""

from collections.abc import Callable

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from ..common.distributed import Ranks
from ..config.classification import Augment, Config
from ..data.classification import check_classes, open_samples, open_source
from ..data.classification_dataset import Batch, ImageDataset
from ..metrics.classification import evaluate
from ..models.checkpoint import KIND
from ..models.classifier import build_model
from .task import Task


class Classification(Task):
    """Images with one label each.

    Parameters
    ----------
    config : Config
    """

    kind, command, config_type = KIND, "train.classify", Config
    metric_name, shown, percent = "top1", ("top1", "top5"), 100.0

    def __init__(self, config: Config):
        super().__init__(config)
        self.mixup, self.criterion = build_loss(config.augment, config.model.num_classes)

    def datasets(self) -> tuple[ImageDataset, ImageDataset]:
        """Open the images, whose classes must be those of the config."""
        sources = {split: open_source(self.config, split) for split in ("train", "val")}
        check_classes(*sources.values())
        train_set, val_set = (open_samples(self.config, split, source) for split, source in sources.items())
        return train_set, val_set

    def model(self, train_set: ImageDataset) -> nn.Module:
        """Create the config's network."""
        return build_model(self.config, train_set.class_names)

    def targets(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images and labels, mixed if the config says so."""
        return self.mixup(batch.images, batch.labels) if self.mixup else (batch.images, batch.labels)

    def loss(self, output: torch.Tensor, targets: torch.Tensor, step: int, counts: list[float]) -> torch.Tensor:
        """Compute the mean cross entropy."""
        return self.criterion(output.float(), targets)

    def evaluate(
        self,
        model: nn.Module,
        samples: ImageDataset,
        ranks: Ranks,
        say: Callable[[str], None],
        stop: Callable[[], bool],
    ) -> dict:
        """Compute top-1 and top-5."""
        return evaluate(model, samples, self.config, ranks, say, stop)

    def checkpoint_fields(self, samples: ImageDataset) -> dict:
        """Return the names of the classes, where the data have any."""
        return {"classes": samples.class_names}


def build_loss(augment: Augment, num_classes: int):
    """Create mixup (or None where it is off) and the loss that fits its targets."""
    if augment.mixup or augment.cutmix:
        mixup = Mixup(augment.mixup, augment.cutmix, label_smoothing=augment.label_smoothing, num_classes=num_classes)
        return mixup, SoftTargetCrossEntropy()
    return None, LabelSmoothingCrossEntropy(augment.label_smoothing)
