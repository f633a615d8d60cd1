"""Naming what pictures show with a trained classifier; a part of :mod:`train.predict`."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..common.distributed import Ranks
from ..common.errors import UserError, one_line
from ..common.output_files import Outputs
from ..config.classification import Config
from ..data.classification import test_transform
from ..data.images import READ_ERRORS, open_rgb
from ..data.normalization import to_input
from ..models.autocast import autocast
from ..models.checkpoint import KIND, read_file
from ..models.trained import open_trained

LISTED = 5


@torch.inference_mode()
def rank_classes(model: nn.Module, config: Config, names: list[str] | None, path: Path, ranks: Ranks) -> list[dict]:
    """List the five most probable classes of a picture, best first.

    Parameters
    ----------
    model : Module
        A classifier in evaluation mode.
    config : Config
        With which it was trained.
    names : list of str, optional
        Of its classes; numbers stand for them by default.
    path : Path
    ranks : Ranks

    Returns
    -------
    list of dict
        Each with label, name and score, the probability from 0 to 1.

    Raises
    ------
    READ_ERRORS
        The picture cannot be read.
    """
    image = test_transform(config.data)(open_rgb(path))[None].to(ranks.device)
    with autocast(config, ranks):
        logits = model(image)
    scores, labels = logits[0].float().softmax(0).topk(min(LISTED, logits.shape[1]))
    return [
        {"label": label, "name": names[label] if names else f"class {label}", "score": score}
        for label, score in zip(labels.tolist(), scores.tolist(), strict=True)
    ]


def name_pictures(checkpoint: str, overrides: list[str], pictures: dict[str, Path], outputs: Outputs) -> int:
    """Print each picture's class, and write NAME.json with the five best; exit code 1 if one could not be read."""
    outputs.check(f"{name}.json" for name in pictures)
    model, config = open_trained(checkpoint, None, None, overrides)
    names = read_file(Path(checkpoint), KIND).get("classes")
    if names and len(names) != config.model.num_classes:
        raise UserError(
            f"checkpoint {checkpoint} is damaged: {len(names)} names for {config.model.num_classes} classes"
        )
    ranks, skipped = Ranks(config.run.device), 0
    model.eval().to(ranks.device)
    for name, path in tqdm(pictures.items(), unit="picture", leave=False, disable=None):
        try:
            found = rank_classes(model, config, names, path, ranks)
        except READ_ERRORS as error:
            skipped += 1
            tqdm.write(f"skipped cannot read picture {path}: {one_line(error)}", file=sys.stderr)
            continue
        outputs.write(f"{name}.json", json.dumps({"picture": str(path), "classes": found}).encode())
        tqdm.write(f"{path}: {found[0]['name']} {100 * found[0]['score']:.1f} %")
    print(f"{len(pictures) - skipped} pictures, {skipped} unreadable; the {LISTED} best of each in {outputs.folder}")
    return 1 if skipped else 0


@torch.no_grad()
def find_tokens(model: nn.Module, picture: np.ndarray) -> list[dict]:
    """Run the network on one picture and collect what ``draw_stages`` draws.

    Parameters
    ----------
    model : Module
        Of ``fast.create_model``.
    picture : ndarray of uint8, shape (H, W, 3)

    Returns
    -------
    list of dict
        For each stage: positions (n, 2) int64, strides (n,) int64 in cells, cluster (n,) int64.
    """
    from fast.grid_prior import local_stride

    model.eval()
    _, stages = model.forward_features(to_input(picture), return_stages=True)
    return [
        {
            "positions": stage.positions[0].numpy(),
            "strides": local_stride(stage.positions)[0].numpy(),
            "cluster": stage.cluster[0].numpy(),
        }
        for stage in stages
    ]
