"""Weights into a network: from this project's checkpoints or the official ones."""

from pathlib import Path

from torch import nn

from .checkpoint import COMMANDS, read_file
from .errors import UserError, one_line


def weights_of(state: dict) -> dict:
    """Choose a checkpoint's weights: the averaged ones where there are some."""
    return state["ema"] or state["model"]


def read_official(path: str) -> dict:
    """Read an official checkpoint and rename its keys, never running code from it."""
    import fast.checkpoints

    if not Path(path).is_file():
        raise UserError(f"no checkpoint {path}")
    try:
        state = fast.checkpoints.load(path)
        return fast.checkpoints.from_official(state.get("model", state))
    except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
        raise UserError(f"official weights {path}: {one_line(error)}") from error


def load_strictly(model: nn.Module, weights: dict, path: str) -> None:
    """Load weights that must fit exactly."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the model: {one_line(error)}") from error


def load_initial(model: nn.Module, path: str) -> None:
    """Start from weights whose classifier may be for other classes; such a one is left as created.

    Parameters
    ----------
    model : Module
        Of ``fast.create_model``.
    path : str
        A checkpoint of train.classify or official weights.

    Raises
    ------
    UserError
        Unreadable, or misfitting elsewhere than in the classifier.
    """
    weights = weights_of(read_file(Path(path))) if kind_of(path) in COMMANDS else read_official(path)
    own = model.state_dict()
    head = next(name for name, module in model.named_modules() if module is model.get_classifier())
    for key in (f"{head}.weight", f"{head}.bias"):
        if key in weights and weights[key].shape != own[key].shape:
            weights[key] = own[key]
    load_strictly(model, weights, path)


def kind_of(path: str) -> str | None:
    """Tell what a checkpoint of this project calls itself, without running code from it; None for other files."""
    import fast.checkpoints

    if not Path(path).is_file():
        raise UserError(f"no checkpoint {path}")
    try:
        return fast.checkpoints.load(path).get("kind")
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise UserError(f"{path}: {one_line(error)}") from error
