"""Which tokens a segmenter keeps."""

import torch
from torch import nn

from fast.grid_prior import local_stride


@torch.inference_mode()
def find_tokens(model: nn.Module, image: torch.Tensor) -> list[dict]:
    """Collect positions (n, 2) and strides (n,) of each stage of a segmenter for an image (3, H, W)."""
    stages, _ = model.backbone.run_stages(image[None].to(next(model.parameters()).device))
    return [
        {"positions": each.positions[0].cpu().numpy(), "strides": local_stride(each.positions)[0].cpu().numpy()}
        for each in stages
    ]
