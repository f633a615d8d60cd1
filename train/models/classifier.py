"""From a config to the things that are trained: model, optimiser, schedule, loss."""

from torch import nn

from ..common.errors import UserError, one_line
from ..config.classification import Config
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
