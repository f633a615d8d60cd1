"""The optimiser of both tasks: AdamW or Muon, timm's grouping, at a rate for the total batch, by layer if asked."""

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from ..config import segmentation
from ..config.section import Section
from .layers import describe_decay, layer_depths

BACKBONE = "backbone."


def peak_rate(config: Section) -> tuple[float, str]:
    """Compute the peak learning rate.

    Parameters
    ----------
    config : Config
        Of a classifier or a segmenter.

    Returns
    -------
    rate : float
        ``optim.lr``, or the rate for a batch of a stated size times total batch / that size.
    words : str
        The arithmetic that led to it.
    """
    optim, total = config.optim, config.run.total_batch
    part = describe_decay(optim.layer_decay)
    if isinstance(optim, segmentation.Optim):
        per_batch, batch, part = optim.lr_per_batch, optim.batch, f", backbone x {optim.backbone:g}{part}"
    else:
        per_batch, batch = optim.lr_per_512, 512
    if optim.lr is not None:
        return optim.lr, f"learning rate {optim.lr:g} as given{part}"
    rate = per_batch * total / batch
    return rate, f"learning rate {per_batch:g} x {total} / {batch} = {rate:g}{part}"


def build_optimizer(model: nn.Module, config: Section) -> torch.optim.Optimizer:
    """Create the optimiser of the parameters that are trained: AdamW, or for a segmenter Muon if asked.

    Muon (K. Jordan et al., https://kellerjordan.github.io/posts/muon) makes the step of a matrix orthogonal; timm's,
    with Nesterov's momentum, scales it as large as AdamW's would be (Moonlight, arXiv:2502.16982) so that both take the
    same learning rates. Norms, biases, embeddings and matrices with a side below 4 go on with NAdamW. The groups and
    their order are part of a checkpoint's optimiser state.

    Parameters
    ----------
    model : Module
        A classifier, or a segmenter for the config of one.
    config : Config

    Returns
    -------
    Optimizer
    """
    optim, rate = config.optim, peak_rate(config)[0]
    if isinstance(optim, segmentation.Optim) and optim.kind == "muon":
        return create_optimizer_v2(segmenter_groups(model, optim, rate), opt="nmuon", lr=rate, betas=optim.betas)
    if isinstance(optim, segmentation.Optim):
        return torch.optim.AdamW(segmenter_groups(model, optim, rate), betas=optim.betas, fused=True)
    parameters = model if optim.layer_decay is None else layer_groups(model, optim.weight_decay, optim.layer_decay)
    return create_optimizer_v2(parameters, opt="adamw", lr=rate, weight_decay=optim.weight_decay, betas=optim.betas)


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


def segmenter_groups(model: nn.Module, optim: segmentation.Optim, rate: float) -> list[dict]:
    """Group a segmenter's parameters: head and backbone, each with and without weight decay; more for layers if asked.

    Norms, 1-D parameters, embeddings (queries', levels') and what ``model.no_weight_decay()`` names are not decayed.
    """
    decay, layer_decay = optim.weight_decay, optim.layer_decay
    depths = {} if layer_decay is None else layer_depths(model)
    spared = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    spared |= set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        free = parameter.ndim < 2 or name in spared or name.endswith("level_embedding")
        inside = name.startswith(BACKBONE)
        key = (inside, free, depths.get(name, 0))
        group = {"lr": rate * (optim.backbone if inside else 1), "weight_decay": 0.0 if free else decay}
        if optim.kind == "muon":
            group["use_fallback"] = free  # no matrix
        if depths:
            group["lr_scale"] = layer_decay ** depths[name]
        groups.setdefault(key, group | {"params": []})["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]
