"""Draw, on a picture, which tokens each stage has kept, and the clusters.

    python -m train.show PICTURE --pretrained digits
    python -m train.show PICTURE --checkpoint outputs/digits_nano/best.pt --out tokens.png
    python -m train.show PICTURE --official WEIGHTS --config imagenet_mini

Without a picture: scikit-image's astronaut. Without weights: a new network, whose scores mean nothing yet.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from .common.errors import Parser, UserError, one_line, run_command
from .common.output_files import Outputs
from .config.classification import Config
from .data.images import READ_ERRORS, open_rgb
from .inference.classification import find_tokens
from .models.checkpoint import SEGMENTER
from .models.classifier import build_model
from .models.pretrained import one_of
from .models.trained import open_trained
from .models.weights import kind_of
from .visualization.figures import as_png
from .visualization.tokens import draw_stages

LONGEST = 16  # times the short side: more slender pictures are shown smaller
MOST_PIXELS = 1 << 24


def open_picture(path: str | None, side: int) -> np.ndarray:
    """Read any picture as RGB and scale its short side; sides are at least 32, the long one at most 16 times ``side``.

    Parameters
    ----------
    path : str or None
        None: scikit-image's astronaut.
    side : int
        Short side wanted, pixels.

    Returns
    -------
    ndarray of uint8, shape (H, W, 3)
    """
    if path is None:
        from skimage.data import astronaut

        picture = Image.fromarray(astronaut())
    else:
        try:
            picture = open_rgb(path)
        except READ_ERRORS as error:
            raise UserError(f"cannot read picture {path}: {one_line(error)}") from error
    scale = min(side / min(picture.size), LONGEST * side / max(picture.size))
    size = tuple(max(32, round(length * scale)) for length in picture.size)
    if size[0] * size[1] > MOST_PIXELS:
        raise UserError(f"the network would see {size[0]:,} x {size[1]:,} pixels: pass a smaller --size")
    return np.asarray(picture.resize(size, Image.Resampling.BICUBIC))


def open_network(options) -> tuple[nn.Module, Config, str]:
    """Create the network the command line names, with a word on its weights."""
    if options.checkpoint or options.official:
        if options.checkpoint and not options.official and kind_of(options.checkpoint) == SEGMENTER:
            raise UserError(f"{options.checkpoint} holds a segmenter: train.predict draws its tokens, too")
        model, config = open_trained(options.checkpoint, options.config, options.official)
        return model, config, Path(options.checkpoint or options.official).name
    torch.manual_seed(0)
    config = Config()
    config.model.name = options.model
    return build_model(config), config, "untrained weights: scores mean nothing yet"


def main(arguments: list[str]) -> int:
    """Run the command."""
    parser = Parser("train.show", __doc__)
    parser.add_argument("picture", nargs="?", help="any picture file; default: scikit-image's astronaut")
    parser.add_argument("--checkpoint", help="file of train.classify")
    parser.add_argument("--pretrained", help="classifier that comes with the package: see fast.list_pretrained()")
    parser.add_argument("--official", help="official weights, with --config")
    parser.add_argument("--config", help="config of the official weights")
    parser.add_argument("--model", default="aff_mini", help="a new network of this name, if no weights are given")
    parser.add_argument("--size", type=int, help="short side in pixels; default: the config's")
    parser.add_argument("--out", default="tokens.png", help="PNG to write; never over a file that is not ours")
    options = parser.parse_args(arguments)
    options.checkpoint = one_of(options.checkpoint, options.official, options.pretrained)
    out = Path(options.out)
    outputs = Outputs(out.parent, [each for each in (options.picture, options.checkpoint, options.official) if each])
    outputs.check([out.name])
    model, config, weights = open_network(options)
    picture = open_picture(options.picture, options.size or config.data.size)
    try:
        stages = find_tokens(model, picture)
    except ValueError as error:
        raise UserError(one_line(error)) from error
    name, (height, width, _) = Path(options.picture or "astronaut").name, picture.shape
    title = f"{config.model.name} ({weights}) on {name}, {width} x {height}"
    outputs.write(out.name, as_png(draw_stages(picture, stages, title)))
    print(f"wrote {options.out}: tokens per stage {', '.join(str(len(stage['positions'])) for stage in stages)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
