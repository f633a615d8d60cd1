"""Pictures as networks take them."""

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def to_input(picture: np.ndarray) -> torch.Tensor:
    """Normalise a picture (H, W, 3) uint8 to what the network takes, (1, 3, H, W) float32."""
    image = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255
    return (image - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def normalise(image: Tensor) -> Tensor:
    """Turn uint8 (3, H, W) into what the network takes, float32."""
    return F.normalize(F.to_dtype(image, torch.float32, scale=True), list(MEAN), list(STD), inplace=True)
