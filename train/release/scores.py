"""Scores of weights that are exported, and the sample pictures that are kept with them; part of :mod:`train.export`."""

import json
from pathlib import Path

from PIL import Image
from torch import nn

from ..common.distributed import Ranks
from ..common.errors import UserError
from ..config.classification import Config
from ..config.loader import override
from ..config.section import Section
from ..config.segmentation import Config as SegmentationConfig
from ..data.classification import open_samples
from ..data.masks import box, encode
from ..data.segmentation import open_val
from ..data.segmentation_dataset import EvalDataset
from ..data.segmentation_transforms import EvalTransform
from ..metrics.classification import evaluate
from ..models.checkpoint import KIND, SEGMENTER, read_file
from ..models.pretrained import read_header
from ..models.segmenter import build_model, load_strictly
from ..models.trained import with_weights
from ..models.weights import kind_of, weights_of
from ..tasks.segmentation import evaluate as evaluate_segmenter

CONFIGS = {KIND: Config, SEGMENTER: SegmentationConfig}
LEFT_OUT = ("score", "per_class", "bad_images", "loss")  # of an evaluation


def open_model(state: dict, config: Section, path: str) -> nn.Module:
    """Create the network of a checkpoint's state."""
    if state["kind"] == KIND:
        return with_weights(config, weights_of(state), path)[0]
    config.model.init = config.model.backbone_init = None
    model = build_model(config)
    load_strictly(model, weights_of(state), path)
    return model


def evaluate_model(model: nn.Module, state: dict, config: Section) -> dict:
    """Measure a network on the validation pictures that its config names.

    Returns
    -------
    dict
        Scores in percent, and images, how many there were.

    Raises
    ------
    UserError
        No such pictures, or of other classes than the network's.
    """
    ranks = Ranks(config.run.device)
    try:
        model = model.to(ranks.device)
        if state["kind"] == KIND:
            found = evaluate(model, open_samples(config, "val"), config, ranks)
            values = (
                {"top1": 100 * found["top1"], "top5": 100 * found["top5"], "images": found["images"]} if found else {}
            )
        else:
            source = open_val(config)
            known = [each["name"] for each in state["vocabulary"]["classes"]]
            if [each.name for each in source.vocabulary.classes] != known:
                raise UserError(f"the data's classes are not those of the network: {', '.join(known[:5])} ...")
            transform = EvalTransform(config.data.test_short, config.data.test_longest)
            samples = EvalDataset(source, transform, config.run.seed, config.data.on_bad_image)
            values = evaluate_segmenter(model, samples, config, ranks)
    finally:
        ranks.close()
    if not values:
        raise UserError("no validation picture could be evaluated")
    return {name: value for name, value in values.items() if name not in LEFT_OUT}


def samples_of(path: Path) -> Path:
    """Return the folder of the sample pictures of NAME.safetensors."""
    return path.with_name(f"{path.stem}_samples")


def on_samples(config: Section, pictures: int, folder: Path) -> Section:
    """Return the config with the sample pictures in place of the validation set."""
    config = config.model_copy(deep=True)
    if config.data.source == "digits":
        config.data.val_length = pictures
    else:
        config.data.path, config.data.images = [str(folder / "samples.json")] * 2, [str(folder)]
        config.data.kind = None
    return config


def keep_samples(state: dict, config: Section, wanted: str, folder: Path) -> tuple[int, str]:
    """Write sample pictures with their objects as a COCO json, unless they can be drawn anew.

    Parameters
    ----------
    state : dict
        The checkpoint's.
    config : Section
    wanted : str
        A number, for as many of the first validation pictures, or names with commas between.
    folder : Path
        Made for them.

    Returns
    -------
    pictures : int
    what : str
        What they are, in words.

    Raises
    ------
    UserError
        Names that are not in the validation set, or pictures that cannot be kept so.
    """
    if config.data.source == "digits" or wanted == "0":
        if not wanted.isdecimal():
            raise UserError(f"--samples of Scattered Digits is how many, not {wanted!r}")
        return int(wanted), f"the first {int(wanted)} validation pictures of Scattered Digits"
    if state.get("task") != "instance":
        raise UserError("only pictures of instance segmentation are kept: pass --samples 0")
    source = open_val(config)
    chosen = choose(source, wanted)
    content = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": each.id, "name": each.name} for each in source.vocabulary.classes]
    folder.mkdir()
    for number, (name, index) in enumerate(chosen.items(), 1):
        sample = source.load(index)
        height, width = sample.image.shape[:2]
        content["images"].append({"id": number, "file_name": f"{name}.png", "width": width, "height": height})
        for label, mask, crowd in zip(sample.labels.tolist(), sample.masks, sample.crowd.tolist(), strict=True):
            content["annotations"].append({
                "id": len(content["annotations"]) + 1, "image_id": number, "iscrowd": int(crowd),
                "category_id": source.vocabulary.classes[label].id, "area": int(mask.sum()), "bbox": box(mask),
                "segmentation": encode(mask),
            })  # fmt: skip
        grey = (sample.image == sample.image[..., :1]).all()
        Image.fromarray(sample.image[..., 0] if grey else sample.image).save(folder / f"{name}.png", optimize=True)
    (folder / "samples.json").write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
    return len(chosen), f"the {len(chosen)} validation pictures in `{folder.name}/`"


def choose(source, wanted: str) -> dict[str, int]:
    """Find validation pictures: their file's name without ending (or their id) -> their index."""
    files = [each["file_name"] for each in getattr(source, "images", [])]
    names = [Path(file).stem for file in files] or [source.name(index) for index in range(len(source))]
    if wanted.isdecimal() and wanted not in names:
        wanted = ",".join(names[: int(wanted)])
    places = {name: index for index, name in enumerate(names)}
    missing = [name for name in wanted.split(",") if name not in places]
    if missing:
        raise UserError(f"no validation picture {missing[0]}; there are {', '.join(names[:5])} ... ({len(names)})")
    return {name: places[name] for name in wanted.split(",")}


def evaluate_samples(path: Path) -> dict:
    """Measure exported weights on the sample pictures kept with them: what the file's header says they score."""
    kind = kind_of(str(path))
    state = read_file(path, kind)
    config = override(state["config"], [], CONFIGS[kind])
    pictures = read_header(path)["samples"]["pictures"]
    return evaluate_model(open_model(state, config, str(path)), state, on_samples(config, pictures, samples_of(path)))
