"""Segment pictures with a trained segmenter, or name what they show with a trained classifier.

    python -m train.predict PICTURE_OR_FOLDER --pretrained nuclei --out predictions
    python -m train.predict PICTURE_OR_FOLDER --checkpoint outputs/demo/best.pt --out predictions
    python -m train.predict PICTURE_OR_FOLDER --official WEIGHTS --config ade20k_mini --out predictions

A segmenter writes for each picture NAME.png, the overlay with names and scores and beside it the tokens kept, and
NAME.json, the segments with COCO's run lengths; a classifier prints the picture's class and writes NAME.json, the five
best. Nothing is written over an input, or over a file that is not as we wrote it. Exit code 1 if a picture could not be
read.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn
from tqdm import tqdm

from .common.distributed import Ranks
from .common.errors import Parser, UserError, one_line, run_command
from .common.output_files import Outputs
from .config.loader import load_config, override
from .config.segmentation import Config
from .data.images import ImageError, describe_unread, list_pictures
from .data.mask_files import read_picture
from .data.sample import TASKS, Vocabulary
from .data.segmentation import known_vocabulary, unpack_vocabulary
from .inference.classification import name_pictures
from .inference.tokens import find_tile_tokens
from .inference.views import cut_view, predict, prepare_views
from .models.autocast import autocast
from .models.checkpoint import KIND, SEGMENTER, TRAINED, naming, read_file
from .models.pretrained import one_of
from .models.segmenter import build_model, load_strictly
from .models.weights import kind_of, weights_of
from .visualization.figures import as_png
from .visualization.segments import draw_result, list_segments


@dataclass
class Predictor:
    """A trained segmenter and what it was trained on.

    Parameters
    ----------
    model : Module
        In evaluation mode.
    config : Config
    vocabulary : Vocabulary
    task : str
        What it was trained for.
    ranks : Ranks
        The device it runs on.
    """

    model: nn.Module
    config: Config
    vocabulary: Vocabulary
    task: str
    ranks: Ranks

    def __call__(self, picture: np.ndarray, task: str):
        """Segment a picture (H, W, 3) uint8: the prediction, the tokens of each stage, and the size the network saw."""
        views, size, evaluator = prepare_views(picture, self.config), picture.shape[:2], self.config.evaluator
        precision, first = autocast(self.config, self.ranks), views[0]
        try:
            found = predict(self.model, views, size, [task], self.vocabulary, evaluator, precision)[task]
            return found, find_tile_tokens(self.model, first.image, cut_view(first, size, evaluator)), first.size
        except ValueError as error:
            raise UserError(one_line(error)) from error


def open_predictor(checkpoint: str | None, config: str | None, official: str | None, overrides: list[str] = ()):
    """Create a Predictor of a checkpoint of train.segment, or of a config and official weights.

    Raises
    ------
    UserError
        Neither or both are named, or they do not fit.
    """
    if checkpoint and official:
        raise UserError("give --checkpoint or --official, not both")
    if checkpoint:
        state = read_file(Path(checkpoint), SEGMENTER, (*TRAINED, "vocabulary", "task"))
        with naming(checkpoint):
            settings = override(state["config"], overrides, Config)
            settings.model.init = settings.model.backbone_init = None
            model, vocabulary = build_model(settings), unpack_vocabulary(state["vocabulary"])
            load_strictly(model, weights_of(state), checkpoint)
        task = state["task"]
    elif config and official:
        settings = load_config(config, [*overrides, "--model.init", official], Config)
        vocabulary = known_vocabulary(settings)
        settings.model.num_classes = vocabulary.num_classes
        model, task = build_model(settings), settings.data.task or "semantic"
    else:
        raise UserError("name the weights: --pretrained NAME, --checkpoint FILE, or --config NAME with --official FILE")
    ranks = Ranks(settings.run.device)
    return Predictor(model.eval().to(ranks.device), settings, vocabulary, task, ranks)


def how_to_look(options) -> list[str]:
    """Turn the options of tiles and views into overrides of a segmenter's config."""
    values = {"tile": options.tile, "tile_overlap": options.tile_overlap, "scales": options.scales}
    given = {key: value for key, value in values.items() if value is not None} | (
        {"flip": True} if options.flip else {}
    )
    return [part for key, value in given.items() for part in (f"--evaluator.{key}", json.dumps(value))]


def find_pictures(path: Path, out: Path) -> dict[str, Path]:
    """Name the pictures at a path: a folder's by where they lie in it; what was written by us is left out."""
    if not path.exists():
        raise UserError(f"no picture or folder {path}")
    if not path.is_dir():
        return {path.stem: path}
    own, target = Outputs(path), out.resolve()
    inside = path.resolve() in target.parents
    inner = [
        each.relative_to(path) for each in list_pictures(path) if not (inside and target in each.resolve().parents)
    ]
    inner = [each for each in inner if not own.is_own(each.as_posix())]
    unread = describe_unread(path)
    if not inner:
        raise UserError(f"no pictures in {path}{f' ({unread})' if unread else ''}")
    if unread:
        print(f"note: {unread}", file=sys.stderr)
    plain = [each.with_suffix("").as_posix() for each in inner]
    names = [name if plain.count(name) == 1 else each.as_posix() for name, each in zip(plain, inner, strict=True)]
    if len(set(names)) < len(names):
        names = [each.as_posix() for each in inner]
    return {name: path / each for name, each in zip(names, inner, strict=True)}


def write_result(predictor: Predictor, name: str, path: Path, outputs: Outputs, options) -> int:
    """Segment one picture, write NAME.png and NAME.json, and count its segments."""
    picture = read_picture(path)
    found, stages, inner = predictor(picture, options.task)
    segments = list_segments(options.task, found, predictor.vocabulary, options.least)
    height, width = picture.shape[:2]
    title = f"{path.name}, {width} x {height}: {options.task}"
    result = {"picture": str(path), "size": [height, width], "task": options.task, "segments": segments}
    outputs.write(f"{name}.png", as_png(draw_result(picture, segments, stages, inner, title)))
    outputs.write(f"{name}.json", json.dumps(result).encode())
    return len(segments)


def main(arguments: list[str]) -> int:
    """Run the command."""
    parser = Parser("train.predict", __doc__, "overrides: as python -m train.segment --help lists them")
    parser.add_argument("path", help="a picture, or a folder of pictures")
    parser.add_argument("--checkpoint", help="file of train.segment or train.classify: last.pt or best.pt")
    parser.add_argument("--pretrained", help="weights that come with the package: a name of fast.list_pretrained()")
    parser.add_argument("--official", help="official segmenter, for the model of --config")
    parser.add_argument("--config", help="a config's name or YAML file, with --official; a checkpoint brings its own")
    parser.add_argument("--task", choices=TASKS, help="default: what the network was trained for")
    parser.add_argument("--least", type=float, default=0.5, help="instance: least score shown and listed")
    parser.add_argument(
        "--tile", type=int, help="cut large pictures into overlapping tiles with sides of so many pixels"
    )
    parser.add_argument("--tile-overlap", type=int, help="pixels that neighbouring tiles share; default: tile / 8")
    parser.add_argument("--flip", action="store_true", help="semantic, instance: look at the mirrored picture, too")
    parser.add_argument("--scales", type=float, nargs="+", help="semantic, instance: look at these sizes: 0.75 1 1.25")
    parser.add_argument("--out", default="predictions", help="folder to write to")
    options, overrides = parser.parse_known_args(arguments)
    options.checkpoint = one_of(options.checkpoint, options.official, options.pretrained)
    overrides = [*how_to_look(options), *overrides]
    pictures = find_pictures(Path(options.path), Path(options.out))
    weights = [Path(each) for each in (options.checkpoint, options.official) if each]
    outputs = Outputs(Path(options.out), [*pictures.values(), *weights])
    if options.checkpoint and not options.official and kind_of(options.checkpoint) == KIND:
        return name_pictures(options.checkpoint, overrides, pictures, outputs)
    outputs.check(f"{name}.{kind}" for name in pictures for kind in ("png", "json"))
    predictor = open_predictor(options.checkpoint, options.config, options.official, overrides)
    options.task = options.task or predictor.task
    if options.task != "semantic" and not predictor.vocabulary.things:
        raise UserError(f"the network knows no countable classes: --task {options.task} needs some; pass semantic")
    counts, skipped = [], 0
    for name, path in tqdm(pictures.items(), unit="picture", leave=False, disable=None):
        try:
            counts.append(write_result(predictor, name, path, outputs, options))
        except ImageError as error:
            skipped += 1
            tqdm.write(f"skipped {one_line(error)}", file=sys.stderr)
    print(f"{len(counts)} pictures, {sum(counts)} segments, {skipped} unreadable; written to {options.out}")
    return 1 if skipped else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
