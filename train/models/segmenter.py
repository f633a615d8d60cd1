"""From a config to the segmenter that is trained: network, starting weights, optimiser, schedule."""

from pathlib import Path

import torch
from timm.scheduler import MultiStepLRScheduler, PolyLRScheduler
from torch import nn

from ..common.errors import UserError, one_line
from ..config.segmentation import Config, Model
from .checkpoint import KIND, SEGMENTER, TRAINED, read_file
from .classifier import draw_weights
from .layers import describe_decay, layer_depths
from .pretrained import resolve
from .weights import kind_of, other_classes, places_of, read_official, renumber, weights_of

CLASSIFIER = ("decoder.class_head.weight", "decoder.class_head.bias")
BACKBONE = "backbone."
SHOWN = 6  # keys listed of each sort of misfit


def build_model(config: Config, classes: list[str] | None = None) -> nn.Module:
    """Create the config's segmenter, with the weights it starts from.

    Parameters
    ----------
    config : Config
        ``model.num_classes`` must be known.
    classes : list of str, optional
        Names of the data's classes, by which those of the weights are found.

    Returns
    -------
    Module
        Images (B, 3, H, W) float32 -> fast.SegmenterOutput.

    Raises
    ------
    UserError
        Unknown name or override, or weights that do not fit.
    """
    import fast

    section = config.model
    try:
        model = fast.create_segmenter(
            section.name, section.head, section.backbone, num_classes=section.num_classes, **section.overrides
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"model: {one_line(error)}") from error
    if section.shepard_power is not None:
        fix_power(model, section.shepard_power)
    if section.init_gain is not None:
        draw_weights(model.backbone, section.init_gain)
    if section.backbone_init:
        load_backbone(model, section.backbone_init)
    if section.init:
        load_initial(model, section, classes)
    if section.grad_checkpointing:
        model.backbone.set_grad_checkpointing(True)
    return model


def fix_power(model: nn.Module, power: float) -> None:
    """Set the power of every learnt interpolation, and learn it no more; the parameter holds half of it."""
    for name, parameter in model.named_parameters():
        if name.endswith("shepard_power"):
            nn.init.constant_(parameter, power / 2)
            parameter.requires_grad_(False)


def read_weights(path: str) -> tuple[dict, list[str] | None]:
    """Read a segmenter's weights, of train.segment or official, under our names, and its classes' names if known."""
    if kind_of(path) == SEGMENTER:
        state = read_file(Path(path), SEGMENTER, TRAINED)
        vocabulary = state.get("vocabulary")
        return weights_of(state), vocabulary and [each["name"] for each in vocabulary["classes"]]
    weights = read_official(path)
    if not any(name.startswith(BACKBONE) for name in weights):
        raise UserError(f"{path} holds a classifier, not a segmenter: pass it as --model.backbone_init {path}")
    return weights, None


def load_initial(model: nn.Module, section: Model, classes: list[str] | None = None) -> None:
    """Put ``section.init`` into the model, leaving the classifier as created if ``section.new_classifier``.

    Where the weights' classes and the data's have the same names in another order, the classifier is renumbered.

    Raises
    ------
    UserError
        Unreadable, misfitting, or as many classes as the data's, of other names.
    """
    path, own = resolve(section.init), model.state_dict()
    weights, known = read_weights(path)
    if section.new_classifier:
        weights |= {name: own[name] for name in CLASSIFIER}
    elif classes and known and len(classes) == len(known) and CLASSIFIER[0] in weights:
        places = places_of(classes, known)
        if places is None:
            advice = "name the data's classes so, or pass --model.new_classifier true to start with a new classifier"
            raise other_classes(path, known, classes, advice)
        if len(weights[CLASSIFIER[0]]) == len(known) + 1:
            renumber(weights, CLASSIFIER[0].removesuffix(".weight"), places)
    load_strictly(model, weights, path)


def load_strictly(model: nn.Module, weights: dict, path: str) -> None:
    """Load weights that must fit, or list what does not and say what to do."""
    own = model.state_dict()
    odd = [name for name in own if name in weights and weights[name].shape != own[name].shape]
    sorts = {
        "not in the file": [name for name in own if name not in weights],
        "not in the model": [name for name in weights if name not in own],
        "of other shapes": [f"{name} {tuple(weights[name].shape)} for {tuple(own[name].shape)}" for name in odd],
    }
    problems = [f"{what}: {shortened(names)}" for what, names in sorts.items() if names]
    if problems:
        raise UserError(f"{path} does not fit the model: {'; '.join(problems)}{advice(sorts, odd, weights)}")
    model.load_state_dict(weights)


def shortened(names: list[str]) -> str:
    """List the first few names and count the others."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def advice(sorts: dict[str, list[str]], odd: list[str], weights: dict) -> str:
    """Say what to do about weights that do not fit, as the tail of a sentence."""
    if sorts["not in the file"] or sorts["not in the model"]:
        head = "hcformer" if any(name.startswith("assignments.") for name in weights) else "mask2former"
        return f"; they are of a {head} head: see --model.head, --model.name and --model.overrides"
    if set(odd) <= set(CLASSIFIER):
        classes = weights[CLASSIFIER[0]].shape[0] - 1
        return f"; they know {classes} classes: pass --model.new_classifier true to start with a new classifier"
    return "; pass the settings they were trained with"


def load_backbone(model: nn.Module, path: str) -> None:
    """Start the backbone from a classifier or segmenter, ours or official; alpha and norms of its own may differ.

    Raises
    ------
    UserError
        Unreadable, or of another backbone.
    """
    path = resolve(path)
    kind = kind_of(path)
    weights = weights_of(read_file(Path(path), kind, TRAINED)) if kind in (KIND, SEGMENTER) else read_official(path)
    inner = {name.removeprefix(BACKBONE): value for name, value in weights.items() if name.startswith(BACKBONE)}
    weights = inner or {name: value for name, value in weights.items() if not name.startswith(("norm.", "head."))}
    own = {f"norms.{name}": value for name, value in model.backbone.norms.state_dict().items()}
    load_strictly(model.backbone, own | weights, path)


def peak_rate(config: Config) -> tuple[float, str]:
    """Give the peak learning rate, and the arithmetic that led to it in words."""
    optim, total = config.optim, config.run.total_batch
    part = f", backbone x {optim.backbone:g}{describe_decay(optim.layer_decay)}"
    if optim.lr is not None:
        return optim.lr, f"learning rate {optim.lr:g} as given{part}"
    rate = optim.lr_per_batch * total / optim.batch
    return rate, f"learning rate {optim.lr_per_batch:g} x {total} / {optim.batch} = {rate:g}{part}"


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Create AdamW with four groups: head and backbone, each with and without weight decay; more for layers if asked.

    Norms, 1-D parameters and embeddings (queries', levels') are not decayed.
    """
    rate, decay, layer_decay = peak_rate(config)[0], config.optim.weight_decay, config.optim.layer_decay
    depths = {} if layer_decay is None else layer_depths(model)
    spared = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        free = parameter.ndim < 2 or name in spared or name.endswith("level_embedding")
        inside = name.startswith(BACKBONE)
        key = (inside, free, depths.get(name, 0))
        group = {"lr": rate * (config.optim.backbone if inside else 1), "weight_decay": 0.0 if free else decay}
        if depths:
            group["lr_scale"] = layer_decay ** depths[name]
        groups.setdefault(key, group | {"params": []})["params"].append(parameter)
    return torch.optim.AdamW([groups[key] for key in sorted(groups)], betas=config.optim.betas, fused=True)


def build_scheduler(optimizer: torch.optim.Optimizer, config: Config):
    """Create timm's schedule, counted in updates: warm-up if there is one, then poly or steps.

    Steps are counted from the run's first update. timm lets a step act one update early, which is put right here.
    """
    schedule = config.schedule
    warmup = {"warmup_t": schedule.warmup_updates, "warmup_lr_init": schedule.warmup_lr, "t_in_epochs": False}
    if schedule.kind == "steps":
        late = [step + 1 for step in schedule.steps]
        return MultiStepLRScheduler(optimizer, late, schedule.factor, warmup_prefix=False, **warmup)
    rest = max(1, schedule.updates - schedule.warmup_updates)
    return PolyLRScheduler(optimizer, rest, schedule.power, lr_min=0.0, warmup_prefix=True, **warmup)
