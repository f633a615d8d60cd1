"""Pictures read one way for every command: as a viewer shows them."""

import os
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..common.errors import UserError, one_line

READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
DAMAGE = (TypeError, LookupError, AttributeError, ArithmeticError, MemoryError, RuntimeError, ImportError, struct.error)
SUFFIXES = {
    ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pcx", ".pgm", ".png",
    ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
}  # fmt: skip
UNREAD = {
    ".arw", ".cr2", ".cr3", ".czi", ".dcm", ".dng", ".eps", ".exr", ".fit", ".fits", ".hdr", ".heic", ".heif", ".ico",
    ".icns", ".jxl", ".nd2", ".ndpi", ".nef", ".nii", ".npy", ".orf", ".pdf", ".psd", ".raw", ".svg", ".svs", ".wmf",
}  # fmt: skip
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I")
MOST_PIXELS = 64 * 2**20


class ImageError(UserError):
    """An image that cannot be read; the message names it."""


def walk_files(folder: Path) -> list[Path]:
    """List all regular files under a folder, also through links, each folder once, sorted."""
    found, seen, waiting = [], set(), [folder]
    while waiting:
        here = waiting.pop()
        try:
            identity = here.resolve()
            entries = list(here.iterdir()) if identity not in seen else []
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot look into folder {here}: {one_line(error)}") from error
        seen.add(identity)
        waiting += [entry for entry in entries if os.path.isdir(entry)]
        found += [entry for entry in entries if os.path.isfile(entry)]
    return sorted(found)


def list_pictures(folder: Path) -> list[Path]:
    """List the picture files under a folder, also through links, sorted."""
    return [path for path in walk_files(folder) if path.suffix.lower() in SUFFIXES] if folder.is_dir() else []


def describe_unread(folder: Path) -> str | None:
    """Count the files under a folder whose kinds of picture are not read, as one line; None if there are none."""
    kinds = [path.suffix.lower() for path in walk_files(folder)] if folder.is_dir() else []
    counts = {kind: kinds.count(kind) for kind in sorted(UNREAD.intersection(kinds))}
    listed = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    return f"{folder}: {sum(counts.values())} files left out ({listed}): save them as .png or .jpg" if counts else None


def open_rgb(file) -> Image.Image:
    """Read any picture as a viewer shows it.

    The camera's orientation mark is obeyed; transparent parts show white; 16-bit grey is scaled to 8 bits; palettes,
    grey and CMYK become RGB. Of several frames or pages the first is read.

    Parameters
    ----------
    file : Path, or a file open for reading bytes

    Returns
    -------
    Image
        RGB.

    Raises
    ------
    FileNotFoundError
        No such file, or none that can be read from its start to its end, such as a pipe.
    READ_ERRORS
        Damaged, of more than ``MOST_PIXELS``, or of a kind no viewer shows (32-bit and floating-point pixels).
    """
    return open_with(file, lambda picture: to_rgb(ImageOps.exif_transpose(picture)))


def open_with(file, convert):
    """Open an image file, see that it is not too large, and convert it."""
    if isinstance(file, str | Path) and not os.path.isfile(file):
        raise FileNotFoundError(f"no file {file}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of damaged or large files that are refused or read anyhow
            with Image.open(file) as picture:
                width, height = picture.size
                if width * height > MOST_PIXELS:
                    raise ValueError(f"it has {width:,} x {height:,} pixels, more than {MOST_PIXELS:,}: cut it up")
                return convert(picture)
    except DAMAGE as error:  # Pillow's readers raise these, too, for damaged files
        raise ValueError(f"damaged ({type(error).__name__}: {one_line(error)})") from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """Convert a picture of any mode to RGB."""
    if picture.mode == "F" or (picture.mode == "I" and not within_16_bits(picture)):
        raise ValueError(f"its pixels are {picture.mode} (32 bits): save it with 8 or 16 bits a channel")
    if picture.mode in SIXTEEN_BITS:
        values = np.asarray(picture).astype(np.uint32)
        picture = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return picture.convert("RGB")


def within_16_bits(picture: Image.Image) -> bool:
    """Whether all values of a picture of mode I are from 0 to 65535."""
    least, most = picture.getextrema()
    return least >= 0 and most <= 65535
