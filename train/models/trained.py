"""Classifiers with trained weights."""

from pathlib import Path

from torch import nn

from ..common.errors import UserError
from ..config.classification import Config
from ..config.loader import load_config, override
from .checkpoint import TRAINED, naming, read_file
from .classifier import build_model
from .weights import load_strictly, read_official, weights_of


def open_trained(checkpoint: str | None, config: str | None, official: str | None, overrides: list[str] = ()):
    """Create a network with trained weights.

    Parameters
    ----------
    checkpoint : str, optional
        File of train.classify; brings its config.
    config : str, optional
        Config's name or YAML file, in the absence of a checkpoint's.
    official : str, optional
        Official weights for that config's model.
    overrides : list of str
        As ``load_config``'s.

    Returns
    -------
    model : Module
        With ``class_names``, those of the data that it was trained on, or None where they are not known.
    config : Config
    """
    if checkpoint and official:
        raise UserError("give --checkpoint or --official, not both")
    if checkpoint:
        state = read_file(Path(checkpoint), needs=TRAINED)
        with naming(checkpoint):
            settings = load_config(config, overrides) if config else override(state["config"], overrides)
            model, settings = with_weights(settings, weights_of(state), checkpoint)
        model.class_names = state.get("classes")
        return model, settings
    if not (config and official):
        raise UserError("name what to evaluate: --checkpoint FILE, or --config NAME with --official FILE")
    return with_weights(load_config(config, overrides), read_official(official), official)


def with_weights(config: Config, weights: dict, path: str) -> tuple[nn.Module, Config]:
    """Build a config's model and put weights into it."""
    config.model.init = None
    model = build_model(config)
    load_strictly(model, weights, path)
    model.class_names = None
    return model, config
