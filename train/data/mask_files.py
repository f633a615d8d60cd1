"""Pictures and masks read from files, and the errors that name what is wrong with them."""

from pathlib import Path

import numpy as np
from PIL import Image

from ..common.errors import one_line
from .images import READ_ERRORS, SIXTEEN_BITS, ImageError, open_rgb, open_with


class DataError(ImageError):
    """A picture or annotation that cannot be used; the message names the file and what to do.

    Parameters
    ----------
    kind : str
        Which sort of trouble, in a few words; the same for all files with the same trouble.
    message : str
    ids : dict of int to int, optional
        Pixels of each unknown id.
    """

    def __init__(self, kind: str, message: str, ids: dict[int, int] | None = None):
        super().__init__(message)
        self.kind, self.ids = kind, ids or {}

    def __reduce__(self):
        return DataError, (self.kind, str(self), self.ids)


def read_picture(path) -> np.ndarray:
    """Read any picture as a viewer shows it, (H, W, 3) uint8; see :func:`train.data.images.open_rgb`.

    Raises
    ------
    DataError
        Missing, damaged, too large, or of a kind no viewer shows.
    """
    return np.array(read("picture", path, open_rgb))


def read_ids(path: Path) -> np.ndarray:
    """Read a mask whose pixels are numbers (8 or 16 bits, or places in a palette), (H, W) int32."""
    return read("mask", path, lambda file: open_with(file, to_ids))


def read_mask(path) -> np.ndarray:
    """Read one object's mask, (H, W) bool: all that is not black."""
    return read("mask", path, lambda file: np.asarray(open_rgb(file)).any(axis=2))


def to_ids(picture: Image.Image) -> np.ndarray:
    """Take a mask's numbers, or refuse one in colours."""
    if picture.mode in ("RGB", "RGBA"):
        channels = np.asarray(picture)
        if (channels[..., 1:3] == channels[..., :1]).all():
            return channels[..., 0].astype(np.int32)
    if picture.mode not in ("1", "L", "P", *SIXTEEN_BITS):
        raise ValueError(f"it is a colour picture ({picture.mode}): save the ids as a PNG with one channel")
    return np.asarray(picture).astype(np.int32)


def read_segment_ids(path: Path) -> np.ndarray:
    """Read a panoptic PNG, whose ids are R + 256 G + 65536 B, (H, W) int32."""
    return read("panoptic mask", path, lambda file: open_with(file, to_segment_ids))


def to_segment_ids(picture: Image.Image) -> np.ndarray:
    """Join a panoptic mask's three channels."""
    if picture.mode not in ("RGB", "RGBA"):
        raise ValueError(f"it has mode {picture.mode}: expected an RGB picture with id = R + 256 G + 65536 B")
    return np.asarray(picture)[..., :3].astype(np.int32) @ np.array([1, 256, 65536], dtype=np.int32)


def read(what: str, path, convert):
    """Convert a file, or say in one line why not."""
    try:
        return convert(path)
    except FileNotFoundError as error:
        raise DataError(f"missing {what}", f"no {what} {path}: put it there, or leave its counterpart out") from error
    except READ_ERRORS as error:
        message = f"cannot read {what} {path}: {one_line(error)}; replace or remove it"
        raise DataError(f"unreadable {what}", message) from error


def check_size(mask: tuple[int, int], mask_path: Path, picture: tuple[int, int], picture_path: Path) -> None:
    """Refuse a mask whose (height, width) differs from its picture's."""
    if mask != picture:
        sizes = [f"{width} x {height}" for height, width in (mask, picture)]
        message = f"{mask_path} is {sizes[0]}, but its picture {picture_path} is {sizes[1]}: export both at one size"
        raise DataError("mask and picture differ in size", message)
