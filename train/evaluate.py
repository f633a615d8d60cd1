"""Print top-1 and top-5 of a checkpoint on the validation images.

python -m train.evaluate --checkpoint outputs/digits_nano/best.pt
python -m train.evaluate --config imagenet_tiny --official WEIGHTS --data PATH
"""

import sys
from pathlib import Path

from torch import nn

from .common.distributed import Ranks
from .common.errors import Parser, UserError, run_command
from .config.loader import Config, load_config, override
from .data.classification import Samples, open_samples
from .metrics.classification import evaluate
from .models.checkpoint import TRAINED, read_file
from .models.classifier import build_model
from .models.pretrained import one_of
from .models.weights import head_of, load_strictly, other_classes, places_of, read_official, renumber, weights_of
from .tasks.classification import class_names


def open_trained(checkpoint: str | None, config: str | None, official: str | None, overrides: list[str] = ()):
    """Make a network with trained weights.

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


def match_classes(model: nn.Module, samples: Samples, path: str) -> None:
    """Renumber a trained classifier as some data number the same names; refuse data with other names."""
    wanted, known = class_names(samples), model.class_names
    if not (wanted and known):
        return
    places = places_of(wanted, known)
    if places is None:
        raise other_classes(path, known, wanted, "name the class folders as they were named in training")
    weights = model.state_dict()
    renumber(weights, head_of(model), places)
    model.load_state_dict(weights)


def main(arguments: list[str]) -> int:
    """Run the command."""
    parser = Parser("train.evaluate", __doc__, "overrides: as python -m train.classify --help lists them")
    parser.add_argument("--checkpoint", help="file of train.classify: last.pt or best.pt")
    parser.add_argument("--pretrained", help="classifier that comes with the package: see fast.list_pretrained()")
    parser.add_argument("--official", help="official weights of the config's model")
    parser.add_argument("--config", help="a config's name or a YAML file; a checkpoint brings its own")
    options, overrides = parser.parse_known_args(arguments)
    options.checkpoint = one_of(options.checkpoint, options.official, options.pretrained)
    model, config = open_trained(options.checkpoint, options.config, options.official, overrides)
    ranks = Ranks(config.run.device)
    try:
        samples = open_samples(config, "val")
        match_classes(model, samples, options.checkpoint)
        result = evaluate(model.to(ranks.device), samples, config, ranks)
    finally:
        ranks.close()
    if not result:
        raise UserError("no validation image could be read")
    if ranks.first:
        bad = f", {result['bad_images']} unreadable left out" if result["bad_images"] else ""
        print(
            f"top-1 {100 * result['top1']:.2f} %, top-5 {100 * result['top5']:.2f} %, loss {result['loss']:.4f} "
            f"on {result['images']:,} images{bad}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
