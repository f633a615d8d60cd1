"""Which tokens a segmenter keeps."""

import numpy as np
import torch
from torch import nn

from fast.grid_prior import local_stride

from .segmentation import CELL
from .tile_grid import Tile


@torch.inference_mode()
def find_tokens(model: nn.Module, image: torch.Tensor) -> list[dict]:
    """Collect positions (n, 2) and strides (n,) of each stage of a segmenter for an image (3, H, W)."""
    stages, _ = model.backbone.run_stages(image[None].to(next(model.parameters()).device))
    return [
        {"positions": each.positions[0].cpu().numpy(), "strides": local_stride(each.positions)[0].cpu().numpy()}
        for each in stages
    ]


def find_tile_tokens(model: nn.Module, image: torch.Tensor, tiles: list[list[Tile]]) -> list[dict]:
    """Collect what ``find_tokens`` does, tile by tile; where tiles overlap, of the tile whose core it is."""
    parts = []
    for tile in (tile for row in tiles for tile in row):
        part = find_tokens(model, image[:, tile.y.start : tile.y.rest, tile.x.start : tile.x.rest])
        corner = np.array([tile.x.start, tile.y.start]) // CELL
        first, last = (np.array([tile.x.core[i], tile.y.core[i]]) / CELL for i in (0, 1))
        for stage in part:
            stage["positions"] = stage["positions"] + corner
            own = ((stage["positions"] >= first) & (stage["positions"] < last)).all(axis=1)
            stage["positions"], stage["strides"] = stage["positions"][own], stage["strides"][own]
        parts.append(part)
    return [
        {key: np.concatenate([each[key] for each in stage]) for key in stage[0]} for stage in zip(*parts, strict=True)
    ]
