"""From images to the tokens of the finest grid (paper sec. 3, Fig. 2)."""

import torch
from torch import nn

from .checks import check_sides

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's red, green, blue, on a scale of 0 to 1
STD = (0.229, 0.224, 0.225)
SMALLEST_SIDE = 32  # pixels


def _check_shape(image):
    """Refuse what is no dense tensor of shape (B, 3, H, W)."""
    if not isinstance(image, torch.Tensor) or image.layout != torch.strided:
        raise TypeError(f"image must be a dense tensor, not {getattr(image, 'layout', type(image).__name__)}")
    if image.ndim != 4 or image.shape[1] != 3:
        raise ValueError(f"image must have 3 channels, shape (B, 3, H, W), but has shape {tuple(image.shape)}")


def prepare_image(image):
    """Check a batch of images, normalise it if it is uint8, and pad right and bottom to a multiple of 4.

    Parameters
    ----------
    image : (B, 3, H, W) tensor
        uint8 (red, green, blue, 0 to 255) or floating point, already normalised. H and W at least 32 pixels.

    Returns
    -------
    (B, 3, 4h, 4w) floating-point tensor
        Padded with zeros after normalisation; float32 from uint8.

    Raises
    ------
    ValueError
        Another number of axes or channels, a side under 32 pixels, a value that is not finite.
    TypeError
        No dense tensor, or a dtype that is neither uint8 nor floating point.
    """
    _check_shape(image)
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"image must be uint8 or floating point, not {image.dtype}")
    height, width = image.shape[2:]
    if min(height, width) < SMALLEST_SIDE:
        raise ValueError(f"image must be at least 32 x 32 pixels, but is {height} x {width}; enlarge it first")
    if image.dtype == torch.uint8:
        mean, std = (torch.tensor(v, device=image.device).view(3, 1, 1) for v in (MEAN, STD))
        image = (image / 255.0 - mean) / std
    else:
        _check_finite(image)
    return nn.functional.pad(image, (0, -width % 4, 0, -height % 4))


def _check_finite(image):
    """Refuse NaN and infinity; in a compiled model, which cannot wait for the answer, by a failing assertion."""
    if image.is_meta:
        return
    finite = image.isfinite().flatten(1).all(dim=1)
    if torch.compiler.is_compiling():
        torch._assert_async(finite.all(), "image holds values that are NaN or infinite")
    elif not finite.all():
        bad = (~finite).nonzero().flatten().tolist()
        raise ValueError(f"image holds values that are NaN or infinite, in number {bad} of the batch")


def grid_positions(grid_size, device=None):
    """Return the positions (h w, 2) of all cells of the grid (h, w), as (x, y), in raster order, int64."""
    check_sides("grid_size", grid_size)
    y, x = torch.meshgrid(*(torch.arange(side, device=device) for side in grid_size), indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)


class PatchEmbedding(nn.Module):
    """Prepared images (B, 3, 4h, 4w) -> tokens (B, h w, C) in raster order, through two convolutions of stride 2."""

    def __init__(self, dim):
        super().__init__()
        self.conv1 = nn.Conv2d(3, dim // 2, 3, stride=2, padding=1)
        self.batch_norm = nn.BatchNorm2d(dim // 2)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image):
        x = nn.functional.gelu(self.batch_norm(self.conv1(image)))
        return self.norm(self.conv2(x).flatten(2).transpose(1, 2))
