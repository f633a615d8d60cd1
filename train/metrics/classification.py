"""Top-1 and top-5 over a split, every image counted once, on one process or many."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from ..common.distributed import Ranks
from ..config.classification import Config
from ..data.classification_dataset import ImageDataset
from ..data.loader import BadImages, load
from ..data.sampler import EvalSampler
from ..models.autocast import autocast


@torch.no_grad()
def evaluate(
    model: nn.Module,
    samples: ImageDataset,
    config: Config,
    ranks: Ranks,
    say: Callable[[str], None] = print,
    stop: Callable[[], bool] = lambda: False,
) -> dict:
    """Evaluate a network.

    Parameters
    ----------
    model : Module
        Images -> logits; put into evaluation mode.
    samples : ImageDataset
    config : Config
    ranks : Ranks
    say : callable
        Told the name of each image that cannot be read.
    stop : callable
        Asked after each batch whether to give up.

    Returns
    -------
    dict
        top1, top5 in 0..1, loss (cross entropy), images (how many were counted) and bad_images (how many could not be
        read and are left out). Empty if stopped, or if no image could be read.
    """
    model.eval()
    bad, sums = BadImages(samples), torch.zeros(4, dtype=torch.float64)
    for batch in load(samples, EvalSampler(samples, config.run.batch_size, ranks), config, ranks.device.type == "cuda"):
        for line in bad.note(batch):
            say(line)
        images, labels = (tensor.to(ranks.device, non_blocking=True) for tensor in (batch.images, batch.labels))
        with autocast(config, ranks):
            logits = model(images)
        real = torch.tensor([asked == used for asked, used in zip(batch.asked, batch.used, strict=True)])
        sums += scores(logits.float(), labels)[real.to(ranks.device)].sum(0, dtype=torch.float64).cpu()
        if stop():
            return {}
    count, top1, top5, loss, missing = ranks.sums([*sums.tolist(), len(bad.seen)])
    if not count:
        return {}
    return {
        "top1": top1 / count,
        "top5": top5 / count,
        "loss": loss / count,
        "images": int(count),
        "bad_images": int(missing),
    }


def scores(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Score each image, (B, 4): 1, right at first, right among five (or all, if fewer), cross entropy."""
    best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="none")
    return torch.stack([torch.ones_like(loss), best[:, 0], best.any(1), loss], 1)
