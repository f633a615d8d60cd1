"""Parts of a network that are kept as they are, and learning rates that fall from the head down to the input."""

from fnmatch import fnmatchcase

from timm.models import group_parameters
from torch import nn

from ..common.errors import UserError
from ..config.loader import closest

BACKBONE = "backbone"
AFTER = (99999,)  # timm's mark: counted with the layer before
LAYERS = {  # of a backbone, from the input on, as timm's group_matcher gives them: the stem, and each block
    "stem": r"^patch_embedding",
    "blocks": [
        (r"^stages\.(\d+)\.blocks\.(\d+)", None),
        (r"^stages\.(\d+)\.(?:importance|merging)", AFTER),
        (r"^norms\.(\d+)", AFTER),
        (r"^norm\.", AFTER),
    ],
}
LISTED = 2  # names of so many levels are shown to choose from


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Let no gradient reach the parameters that patterns name.

    Parameters
    ----------
    model : Module
    patterns : list of str
        Names of modules or parameters, in which * and ? stand for any characters, dots too. ``backbone`` is, of a
        classifier, all but the classifier's head.

    Raises
    ------
    UserError
        A pattern names nothing, or nothing is left to train.
    """
    known = parts(model)
    for pattern in patterns:
        found = [name for name in known if fnmatchcase(name, pattern)]
        if not found:
            choice = [name for name in known if name.count(".") < LISTED and not name.endswith((".weight", ".bias"))]
            advice = f"{closest(pattern, known)}; there are, among others: {', '.join(choice)}"
            raise UserError(f"optim.freeze: nothing is called {pattern!r}{advice}; * stands for any characters")
        for name in found:
            for parameter in known[name]:
                parameter.requires_grad_(False)
    if patterns and is_frozen(model):
        raise UserError(f"optim.freeze {', '.join(patterns)} leaves nothing to train: name less")


def parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """List what can be frozen: the parameters of each module that has some, and each parameter by itself."""
    found = {name: list(module.parameters()) for name, module in model.named_modules() if name}
    if BACKBONE not in found:
        head = {id(parameter) for parameter in model.get_classifier().parameters()}
        found = {BACKBONE: [each for each in model.parameters() if id(each) not in head], **found}
    found |= {name: [parameter] for name, parameter in model.named_parameters()}
    return {name: parameters for name, parameters in found.items() if parameters}


def is_frozen(module: nn.Module) -> bool:
    """Whether a module has parameters and no gradient reaches any of them."""
    wanted = [parameter.requires_grad for parameter in module.parameters()]
    return bool(wanted) and not any(wanted)


def describe_frozen(model: nn.Module, patterns: list[str]) -> list[str]:
    """Describe in a line how much is frozen; no line where nothing is."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    frozen, total = sum(size for size, wanted in sizes if not wanted), sum(size for size, _ in sizes)
    return [f"frozen: {frozen:,} of {total:,} parameters ({', '.join(patterns)})"] if patterns else []


def describe_decay(decay: float | None) -> str:
    """Name the layers' decay as the tail of a sentence."""
    return "" if decay is None else f", x {decay:g} for each layer below the head"


def layer_depths(model: nn.Module) -> dict[str, int]:
    """Count for each parameter how many layers above its own there are, as BEiT and timm count.

    The head (of a segmenter: all but the backbone) is 0, the backbone's last block 1, its patch embedding the number of
    blocks + 1. What chooses and merges tokens is counted with the block before, as norms are.
    """
    inner, prefix = (model.backbone, f"{BACKBONE}.") if hasattr(model, BACKBONE) else (model, "")
    layers = group_parameters(inner, LAYERS, reverse=True)
    top = 1 + sum(len(stage.blocks) for stage in inner.stages)
    depths = {prefix + name: top - min(layer, top) for name, layer in layers.items()}
    return {name: depths.get(name, 0) for name, _ in model.named_parameters()}
