"""Re-execute notebooks and save them with their outputs: ``python notebooks/execute.py`` (all), or ``... 01 05``.

Metadata is kept to what a reader needs (no times, no paths), cells keep their ids, pictures are packed; a cell tagged
"thumbnail" gives the index page's picture.
"""

import sys
import time
from base64 import b64decode, b64encode
from io import BytesIO
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from PIL import Image, ImageColor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # drawing imports train
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
SECONDS = 1200  # for one cell: a minute on an idle machine, many on a busy one
WIDGET = "application/vnd.jupyter.widget-view+json"  # lives as long as its kernel: nothing to store


def chosen(numbers):
    """Return the paths of the notebooks whose names begin with these numbers; of all, if there are none.

    Raises
    ------
    FileNotFoundError
        A number that no notebook has.
    """
    every = sorted(HERE.glob("[0-9][0-9]_*.ipynb"))
    unknown = [number for number in numbers if not any(path.name.startswith(f"{number}_") for path in every)]
    if unknown:
        known = ", ".join(path.name[:2] for path in every)
        raise FileNotFoundError(f"no notebook {', '.join(unknown)}; there are {known}")
    return [path for path in every if not numbers or path.name[:2] in numbers]


def execute(path):
    """Run one notebook from top to bottom and save it; return its figure for the index page (bytes), or None."""
    notebook = nbformat.read(path, as_version=4)
    quiet = {"extra_arguments": ["--log-level=ERROR"], "record_timing": False, "coalesce_streams": True}
    where = {"kernel_name": "python3", "resources": {"metadata": {"path": HERE}}}
    NotebookClient(notebook, timeout=SECONDS, startup_timeout=SECONDS, **where, **quiet).execute()
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({"tags": tags} if (tags := cell.metadata.get("tags")) else {})
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = {}
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = b64encode(smaller(b64decode(output.data["image/png"]))).decode()
    nbformat.write(notebook, path)
    return thumbnail(notebook)


def smaller(png):
    """Return a picture (PNG bytes) in 256 colours, dithered where it has more: 240 of its own, the kinds', greys."""
    from drawing import OKABE_ITO

    packed, picture, palette = BytesIO(), Image.open(BytesIO(png)).convert("RGB"), Image.new("P", (1, 1))
    own = [255 if level > 244 else level for level in picture.quantize(240).getpalette()[: 3 * 240]]  # white is white
    kinds = [part for colour in OKABE_ITO for part in ImageColor.getrgb(colour)]  # dots are few, but must be right
    greys = [level for level in range(255, 0, -32) for _ in range(3)]
    palette.putpalette([*own, *kinds, *greys])
    picture.quantize(palette=palette).save(packed, "PNG", optimize=True)
    return packed.getvalue()


def thumbnail(notebook):
    """Return the last PNG (bytes) that a cell tagged "thumbnail" drew, or None."""
    tagged = [cell for cell in notebook.cells if "thumbnail" in cell.metadata.get("tags", [])]
    pictures = [o.data["image/png"] for cell in tagged for o in cell.outputs if "image/png" in o.get("data", {})]
    return b64decode(pictures[-1]) if pictures else None


def main(numbers):
    """Execute the chosen notebooks, one line each; return the exit status."""
    from drawing import save_thumbnail

    try:
        for path in chosen(numbers):
            start = time.perf_counter()
            picture = execute(path)
            if picture is not None:
                save_thumbnail(picture, path.name[:2])
            print(f"{path.name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size / 2**20:.2f} MB", flush=True)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (CellExecutionError, CellTimeoutError) as error:
        print(error, file=sys.stderr)
        print(f"error: the cell above failed, {path.name} was left as it was", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
