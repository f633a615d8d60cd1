"""Pictures and masks read from files, and the errors that name what is wrong with them."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..data import READ_ERRORS, ImageError
from ..errors import one_line

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".ppm"}
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I")


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


def list_pictures(folder: Path) -> list[Path]:
    """List the picture files under a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def read_picture(path: Path) -> np.ndarray:
    """Read any picture as a viewer shows it.

    The camera's orientation mark is obeyed; transparent parts show white; 16-bit grey is scaled to 8 bits; palettes,
    grey and CMYK become RGB.

    Parameters
    ----------
    path : Path

    Returns
    -------
    ndarray of uint8, shape (H, W, 3)

    Raises
    ------
    DataError
        Missing, damaged, or of a kind no viewer shows (32-bit and floating-point pixels).
    """
    return np.array(read("picture", path, lambda file: to_rgb(ImageOps.exif_transpose(file))))


def to_rgb(picture: Image.Image) -> Image.Image:
    """Convert a picture of any mode to RGB."""
    if picture.mode == "F" or (picture.mode == "I" and picture.getextrema()[1] > 65535):
        raise ValueError(f"its pixels are {picture.mode} (32 bits): save it with 8 or 16 bits a channel")
    if picture.mode in SIXTEEN_BITS:
        values = np.asarray(picture).astype(np.int64)
        picture = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return picture.convert("RGB")


def read_ids(path: Path) -> np.ndarray:
    """Read a mask whose pixels are numbers (8 or 16 bits, or places in a palette), (H, W) int32."""
    return read("mask", path, to_ids)


def to_ids(picture: Image.Image) -> np.ndarray:
    """Take a mask's numbers, or refuse one in colours."""
    if picture.mode not in ("1", "L", "P", *SIXTEEN_BITS):
        raise ValueError(f"it is a colour picture ({picture.mode}): save the ids as a PNG with one channel")
    return np.asarray(picture).astype(np.int32)


def read_segment_ids(path: Path) -> np.ndarray:
    """Read a panoptic PNG, whose ids are R + 256 G + 65536 B, (H, W) int32."""
    return read("panoptic mask", path, to_segment_ids)


def to_segment_ids(picture: Image.Image) -> np.ndarray:
    """Put a panoptic mask's three channels together."""
    if picture.mode not in ("RGB", "RGBA"):
        raise ValueError(f"it has mode {picture.mode}: expected an RGB picture with id = R + 256 G + 65536 B")
    return np.asarray(picture)[..., :3].astype(np.int32) @ np.array([1, 256, 65536], dtype=np.int32)


def read(what: str, path: Path, convert):
    """Open a file and convert it, or say in one line why not."""
    try:
        with Image.open(path) as file:
            return convert(file)
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
