"""Figures as PNG files."""

import io
from pathlib import Path

from ..common.errors import UserError, one_line


def save_figure(figure, path: Path) -> None:
    """Write a figure as PNG into a folder of our own."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(as_png(figure))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path}: {one_line(error)}") from error


def as_png(figure) -> bytes:
    """Draw a figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()
