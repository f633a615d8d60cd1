"""From a config to the things that are trained: model, optimiser, schedule, loss."""

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from ..common.errors import UserError, one_line
from ..config.classification import Augment, Config
from .layers import describe_decay, layer_depths
from .weights import load_initial


def build_model(config: Config, classes: list[str] | None = None) -> nn.Module:
    """Create the config's network, with the weights it starts from.

    Parameters
    ----------
    config : Config
    classes : list of str, optional
        Names of the data's classes, by which those of the weights are found.

    Returns
    -------
    Module
        Images (B, 3, H, W) float32 -> logits (B, num_classes).

    Raises
    ------
    UserError
        Unknown name or override, or weights that do not fit.
    """
    import fast

    section = config.model
    drop_path = {} if section.drop_path is None else {"drop_path": section.drop_path}
    try:
        model = fast.create_model(section.name, num_classes=section.num_classes, **drop_path, **section.overrides)
    except (TypeError, ValueError) as error:
        raise UserError(f"model: {one_line(error)}") from error
    if section.init_gain is not None:
        draw_weights(model, section.init_gain)
    if section.init:
        load_initial(model, section.init, classes)
    if section.grad_checkpointing:
        model.set_grad_checkpointing(True)
    return model


def draw_weights(backbone: nn.Module, gain: float) -> None:
    """Draw the weights of a backbone's linear layers anew: normal with std gain / sqrt(inputs), cut at two.

    The published 0.02 is made for hundreds of channels; at 16 to 64 it leaves what the blocks add next to nothing.
    """
    for module in backbone.modules():
        if isinstance(module, nn.Linear):
            std = gain / module.in_features**0.5
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)


def peak_rate(config: Config) -> tuple[float, str]:
    """Give the peak learning rate, and the arithmetic that led to it in words."""
    optim, total = config.optim, config.run.total_batch
    part = describe_decay(optim.layer_decay)
    if optim.lr is not None:
        return optim.lr, f"learning rate {optim.lr:g} as given{part}"
    rate = optim.lr_per_512 * total / 512
    return rate, f"learning rate {optim.lr_per_512:g} x {total} / 512 = {rate:g}{part}"


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Create AdamW by timm: weight decay on matrices and kernels, none on 1-D ones; groups for layers if asked."""
    optim = config.optim
    parameters = model if optim.layer_decay is None else layer_groups(model, optim.weight_decay, optim.layer_decay)
    return create_optimizer_v2(
        parameters, opt="adamw", lr=peak_rate(config)[0], weight_decay=optim.weight_decay, betas=optim.betas
    )


def layer_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict]:
    """Group the parameters that are trained by layer, from the head on, and by whether they are decayed."""
    groups = {}
    for name, depth in layer_depths(model).items():
        parameter = model.get_parameter(name)
        if parameter.requires_grad:
            free = parameter.ndim < 2
            settings = {"weight_decay": 0.0 if free else weight_decay, "lr_scale": layer_decay**depth, "params": []}
            groups.setdefault((depth, free), settings)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def build_scheduler(optimizer: torch.optim.Optimizer, config: Config, updates: int):
    """Create timm's cosine schedule with warm-up, counted in updates.

    Parameters
    ----------
    optimizer : Optimizer
    config : Config
    updates : int
        Updates of an epoch.

    Returns
    -------
    CosineLRScheduler
        Warm-up is linear to the peak, then a whole half cosine leads to ``min_lr`` at the last epoch's end.
    """
    schedule = config.schedule
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
        updates_per_epoch=updates,
    )
    return scheduler


def build_loss(augment: Augment, num_classes: int):
    """Create mixup (or None where it is off) and the loss that fits its targets."""
    if augment.mixup or augment.cutmix:
        mixup = Mixup(augment.mixup, augment.cutmix, label_smoothing=augment.label_smoothing, num_classes=num_classes)
        return mixup, SoftTargetCrossEntropy()
    return None, LabelSmoothingCrossEntropy(augment.label_smoothing)
