"""From a config to the segmenter that is trained: network, starting weights, optimiser, schedule."""

from pathlib import Path

from torch import nn

from ..common.errors import UserError, one_line
from ..config.segmentation import Config, Model
from .checkpoint import KIND, SEGMENTER, TRAINED, read_file
from .classifier import draw_weights
from .pretrained import resolve
from .weights import kind_of, known_classes, other_classes, places_of, read_official, renumber, weights_of

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
        return weights_of(state), known_classes(state)
    weights = read_official(path)
    if not any(name.startswith(BACKBONE) for name in weights):
        raise UserError(f"{path} holds a classifier, not a segmenter: pass it as --model.backbone_init {path}")
    return weights, None


def load_initial(model: nn.Module, section: Model, classes: list[str] | None = None) -> None:
    """Load ``section.init`` into the model, leaving the classifier as created if ``section.new_classifier``.

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
    """Return what to do about weights that do not fit, as the tail of a sentence."""
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
