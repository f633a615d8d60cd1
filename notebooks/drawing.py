"""Drawing for the notebooks: photographs, tokens, clusters, curves, numbers on a grid. No algorithm lives here.

Everything is drawn in cells of the finest grid (4 x 4 pixels): the centre of cell (x, y) is the point (x, y), y points
down. Kinds get Okabe and Ito's colours, amounts get cividis; colour-blind readers can tell both apart.

A cell tagged "thumbnail" gives the picture of the index page: ``execute.py`` cuts it out of the cell's output.
"""

import inspect
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown
from matplotlib.colors import ListedColormap, to_rgb
from PIL import Image
from scipy.spatial import cKDTree
from skimage.transform import resize

from train.data.digit_parts import read_photograph

CELL = 4  # pixels of a cell of the finest grid
OKABE_ITO = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#000000")
MARK = "#D55E00"  # vermilion: the token that is spoken of
AMOUNT = "cividis"
THUMBNAILS = Path(__file__).parent / "thumbnails"

plt.rcParams.update(
    {
        "figure.dpi": 144,  # sharp when a notebook shows a figure of 10 inches at the width of its column
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": plt.cycler(color=OKABE_ITO[:3] + OKABE_ITO[4:]),  # yellow lines are too pale
        "image.cmap": AMOUNT,
        "image.interpolation": "nearest",
    }
)


def photo(name="cat", height=224, width=224):
    """Load a photograph that ships with scikit-image or scikit-learn, cut to shape about its middle, and resize it.

    Parameters
    ----------
    name : str
        One of ``train.data.digit_parts.PHOTOGRAPHS``: cat, astronaut, coffee, rocket, china.jpg, flower.jpg, ...
    height, width : int
        Pixels.

    Returns
    -------
    (height, width, 3) uint8 array
    """
    whole = read_photograph(name)
    scale = min(whole.shape[0] / height, whole.shape[1] / width)
    tall, wide = round(height * scale), round(width * scale)
    top, left = (whole.shape[0] - tall) // 2, (whole.shape[1] - wide) // 2
    small = resize(whole[top : top + tall, left : left + wide], (height, width), anti_aliasing=True)
    return (255 * small).round().astype(np.uint8)


def grid_size_of(image):
    """Return (h, w), the cells of the finest grid of an image (H, W, 3)."""
    return -(-image.shape[0] // CELL), -(-image.shape[1] // CELL)


def cell_colours(image):
    """Return the mean colour of every cell (h, w, 3), 0 to 1, of an image whose sides are multiples of 4."""
    h, w = grid_size_of(image)
    return image.reshape(h, CELL, w, CELL, 3).mean(axis=(1, 3)) / 255


def bare(axes, grid_size=None):
    """Take ticks and frame away; with a grid size (h, w), show exactly its cells."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_aspect("equal")
    if grid_size is not None:
        axes.set(xlim=(-0.5, grid_size[1] - 0.5), ylim=(grid_size[0] - 0.5, -0.5))


def show_photo(axes, image, title=None, fade=0.0):
    """Draw an image (H, W, 3) under the cells; ``fade`` (0 to 1) mixes it with white, so that marks stand out."""
    h, w = grid_size_of(image)
    colours = image / 255 if image.dtype == np.uint8 else image
    axes.imshow(colours * (1 - fade) + fade, extent=(-0.5, w - 0.5, h - 0.5, -0.5))
    bare(axes, (h, w))
    if title:
        axes.set_title(title)


def show_tokens(axes, image, positions, title=None, size=6.0, colour=MARK, fade=0.5):
    """Draw tokens as dots over a faded image.

    Parameters
    ----------
    axes : Axes
    image : (H, W, 3) uint8 array
    positions : (n, 2) array
        (x, y) in cells.
    title : str, optional
    size : float
        Area of a dot, square points.
    colour : colour, or (n,) numbers
        Numbers are drawn on the scale of amounts. The dots are returned, for a colour bar.
    fade : float
        As for ``show_photo``.
    """
    show_photo(axes, image, title, fade)
    return axes.scatter(*np.asarray(positions).T, s=size, c=colour, linewidths=0)


def nearest_token(positions, grid_size):
    """Return (h, w): for every cell the index of a token nearest to it. For painting only: ties fall as they may."""
    y, x = np.indices(grid_size)
    return cKDTree(positions).query(np.stack([x, y], axis=-1))[1]


def show_fill(axes, positions, values, grid_size, title=None, **style):
    """Paint every cell with the value of its nearest token: numbers (n,) or colours (n, 3). Returns the picture."""
    picture = axes.imshow(np.asarray(values)[nearest_token(positions, grid_size)], **style)
    bare(axes, grid_size)
    if title:
        axes.set_title(title)
    return picture


def show_amounts(axes, amounts, title=None, **style):
    """Draw numbers (h, w), one a cell, on the scale of amounts. Returns the picture, for a colour bar."""
    picture = axes.imshow(amounts, **style)
    bare(axes, amounts.shape)
    if title:
        axes.set_title(title)
    return picture


def map_colours(regions):
    """Choose a colour for each region of a map (h, w) of region numbers, so that neighbours differ: (k, 3).

    Greedy: each region takes the colour least used of those that no coloured neighbour has.
    """
    k = regions.max() + 1
    pairs = [(regions[1:], regions[:-1]), (regions[:, 1:], regions[:, :-1])]
    pairs += [(regions[1:, 1:], regions[:-1, :-1]), (regions[1:, :-1], regions[:-1, 1:])]
    touching = [set() for _ in range(k)]
    for a, b in pairs:
        for i, j in {tuple(sorted(pair)) for pair in zip(a.ravel().tolist(), b.ravel().tolist(), strict=True)}:
            touching[i].add(j), touching[j].add(i)
    palette = np.array([to_rgb(colour) for colour in OKABE_ITO[:7]])
    chosen, used = np.full(k, -1), np.zeros(len(palette))
    for region in range(k):
        taken = {int(chosen[other]) for other in touching[region]}
        free = [colour for colour in range(len(palette)) if colour not in taken] or range(len(palette))
        chosen[region] = min(free, key=lambda colour: used[colour])
        used[chosen[region]] += 1
    return palette[chosen]


def show_clusters(axes, positions, cluster, grid_size, title=None, image=None, dots=True):
    """Paint every cell in the colour of the cluster of its nearest token; clusters that touch differ in colour.

    Parameters
    ----------
    axes : Axes
    positions : (n, 2) int array
    cluster : (n,) int array
    grid_size : (h, w)
    title : str, optional
    image : (H, W, 3) uint8 array, optional
        Shows through.
    dots : bool
        Whether to draw the tokens too.
    """
    regions = np.asarray(cluster)[nearest_token(positions, grid_size)]
    picture = map_colours(regions)[regions]
    if image is not None:
        picture = np.clip(picture * (0.45 + 0.75 * cell_colours(image).mean(axis=2, keepdims=True)), 0, 1)
    axes.imshow(picture)
    if dots:
        axes.scatter(*np.asarray(positions).T, s=3, c="black", linewidths=0)
    bare(axes, grid_size)
    if title:
        axes.set_title(title)


def show_curve(axes, ranks, title=None, numbers=False, width=2.0):
    """Draw a curve through the patches (nh, nw) in the order of their ranks, dark at its start and light at its end."""
    nh, nw = ranks.shape
    y, x = np.divmod(np.argsort(ranks.ravel()), nw)
    for i, colour in enumerate(plt.get_cmap("viridis")(np.linspace(0, 0.9, nh * nw - 1))):
        axes.plot(x[i : i + 2], y[i : i + 2], color=colour, linewidth=width, solid_capstyle="round")
    if numbers:
        for (iy, ix), rank in np.ndenumerate(ranks):
            box = {"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": "none"}
            axes.text(ix, iy, rank, ha="center", va="center", fontsize=8, bbox=box)
    for edge in range(nh + 1):
        axes.axhline(edge - 0.5, color="0.85", linewidth=0.5, zorder=0)
    for edge in range(nw + 1):
        axes.axvline(edge - 0.5, color="0.85", linewidth=0.5, zorder=0)
    bare(axes, ranks.shape)
    if title:
        axes.set_title(title)


def show_numbers(axes, values, title=None, form="{}", mark=None, **style):
    """Write a small matrix (rows, columns) into coloured cells; ``mark`` (same shape, bool) frames some of them."""
    values = np.asarray(values)
    picture = axes.imshow(values, **style)
    level = picture.norm(np.ma.masked_invalid(values.astype(float)))
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if np.ma.filled(level, 0)[row, column] < 0.55 else "black"
        axes.text(column, row, form.format(value), ha="center", va="center", color=colour, fontsize=9)
    if mark is not None:
        for row, column in np.argwhere(mark):
            frame = plt.Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False, edgecolor=MARK, linewidth=2)
            axes.add_patch(frame)
    bare(axes, values.shape)
    if title:
        axes.set_title(title)


def show_source(*things):
    """Return the source of functions or classes as code to read in the notebook."""
    return Markdown("```python\n" + "\n\n".join(inspect.getsource(thing).rstrip() for thing in things) + "\n```")


def table(heading, rows, form="{:.3g}"):
    """Return a table to show in the notebook: ``heading`` a list of words, ``rows`` lists of words and numbers."""
    lines = [heading, ["---"] + ["---:"] * (len(heading) - 1)]
    lines += [[form.format(x) if isinstance(x, float | np.floating) else str(x) for x in row] for row in rows]
    return Markdown("\n".join("| " + " | ".join(line) + " |" for line in lines))


def two_colours(first, second):
    """Return a colour map of two colours, for a map of False and True."""
    return ListedColormap([first, second])


def save_thumbnail(png, number, width=320):
    """Write a small copy of a picture for the index page.

    Parameters
    ----------
    png : bytes
        The picture as PNG.
    number : str
        Of the notebook, two digits; the file is ``thumbnails/<number>.png``.
    width : int
        Pixels.
    """
    picture = Image.open(BytesIO(png)).convert("RGB")
    small = picture.resize((width, round(width * picture.height / picture.width)), Image.Resampling.LANCZOS)
    THUMBNAILS.mkdir(exist_ok=True)
    small.quantize(128).save(THUMBNAILS / f"{number}.png", optimize=True)


def principal_colours(features):
    """Turn features (n, C) into colours (n, 3): the three directions of most variance as red, green and blue."""
    centred = features - features.mean(axis=0)
    along = centred @ np.linalg.svd(centred, full_matrices=False)[2][:3].T
    low, high = np.percentile(along, [2, 98], axis=0)
    return np.clip((along - low) / (high - low), 0, 1)


def show_box(axes, box, colour="white"):
    """Outline a box (x0, y0, x1, y1) given in pixels, the last two exclusive, over a picture drawn in cells."""
    x0, y0, x1, y1 = (side / CELL for side in box)
    axes.add_patch(plt.Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.5))
