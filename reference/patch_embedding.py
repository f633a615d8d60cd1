"""From an image to the tokens of the finest grid (paper sec. 3, first module; Fig. 2).

Two 3 x 3 convolutions of stride 2 turn every 4 x 4 pixels into one token.
"""

import numpy as np

from .checks import check_sides
from .layers import batch_norm, convolution_3x3_stride_2, gelu, layer_norm, subset

MEAN = np.array([0.485, 0.456, 0.406])  # of ImageNet's red, green, blue, on a scale of 0 to 1
STD = np.array([0.229, 0.224, 0.225])
SMALLEST_SIDE = 32  # pixels


def prepare_image(image):
    """Check one image, normalise it if it is uint8, and pad it on the right and bottom to a multiple of 4.

    Sec. 3, Fig. 2.

    Parameters
    ----------
    image : (3, H, W) array
        uint8 (red, green, blue, 0 to 255) or floating point, already normalised. H and W at least 32 pixels.

    Returns
    -------
    (3, 4h, 4w) float64 array
        Padded with zeros after normalisation.

    Raises
    ------
    ValueError
        Another number of axes or channels, a side under 32 pixels, a value that is not finite.
    TypeError
        A dtype that is neither uint8 nor floating point.
    """
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image must have 3 channels, shape (3, H, W), but has shape {image.shape}")
    if image.dtype != np.uint8 and not np.issubdtype(image.dtype, np.floating):
        raise TypeError(f"image must be uint8 or floating point, not {image.dtype}")
    height, width = image.shape[1:]
    if min(height, width) < SMALLEST_SIDE:
        raise ValueError(f"image must be at least 32 x 32 pixels, but is {height} x {width}; enlarge it first")
    if image.dtype == np.uint8:
        image = (image / 255.0 - MEAN[:, None, None]) / STD[:, None, None]
    if not np.isfinite(image).all():
        raise ValueError(f"image holds {np.count_nonzero(~np.isfinite(image))} values that are NaN or infinite")
    return np.pad(image.astype(np.float64), ((0, 0), (0, -height % 4), (0, -width % 4)))


def patch_embedding(image, weights):
    """Embed a prepared image: (3, 4h, 4w) -> tokens (h w, C) in raster order (sec. 3, Fig. 2).

    Convolution to C/2 channels, batch norm, GELU, convolution to C channels, layer norm over the channels.
    """
    x = convolution_3x3_stride_2(image, subset(weights, "conv1"))  # (C/2, 2h, 2w)
    x = gelu(batch_norm(x, subset(weights, "batch_norm")))
    x = convolution_3x3_stride_2(x, subset(weights, "conv2"))  # (C, h, w)
    return layer_norm(x.reshape(len(x), -1).T, subset(weights, "norm"))


def grid_positions(grid_size):
    """Return the positions (h w, 2) of all cells of the grid (h, w), as (x, y), in raster order, int64.

    Sec. 3, Fig. 2.
    """
    check_sides("grid_size", grid_size)
    y, x = np.indices(grid_size)
    return np.stack([x.ravel(), y.ravel()], axis=1)
