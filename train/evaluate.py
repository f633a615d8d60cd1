"""Print top-1 and top-5 of a checkpoint on the validation images.

python -m train.evaluate --checkpoint outputs/digits_nano/best.pt
python -m train.evaluate --config imagenet_tiny --official WEIGHTS --data PATH
"""

import sys

from torch import nn

from .common.distributed import Ranks
from .common.errors import Parser, UserError, run_command
from .data.classification import open_samples
from .data.classification_dataset import ImageDataset
from .metrics.classification import evaluate
from .models.pretrained import one_of
from .models.trained import open_trained
from .models.weights import head_of, other_classes, places_of, renumber


def match_classes(model: nn.Module, samples: ImageDataset, path: str) -> None:
    """Renumber a trained classifier as some data number the same names; refuse data with other names."""
    wanted, known = samples.class_names, model.class_names
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
