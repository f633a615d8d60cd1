"""Figures as PNG files."""

import io


def as_png(figure) -> bytes:
    """Draw a figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()
