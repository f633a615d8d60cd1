"""Pictures of tokens: where each stage has them, how far apart, and in which clusters.

Colours are Okabe and Ito's, which colour-blind readers tell apart.
"""

import matplotlib
import numpy as np
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

matplotlib.use("Agg")

CELL = 4  # pixels of a cell of the finest grid
DOT = 2.4  # side of a token's dot, pixels
STRIDES = {1: "#E69F00", 2: "#56B4E9", 4: "#009E73", 8: "#CC79A7"}  # cells -> colour
WIDER = "#FFFFFF"
CLUSTERS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#FFFFFF")


def faded(picture: np.ndarray) -> np.ndarray:
    """Turn a picture (H, W, 3) uint8 into a dim grey one, so that marks stand out."""
    grey = picture.mean(axis=2, keepdims=True) * 0.5
    return np.repeat(grey, 3, axis=2).astype(np.uint8)


def centres(positions: np.ndarray) -> np.ndarray:
    """Return the centres (n, 2) in pixels of cells (n, 2), in imshow's coordinates."""
    return positions * CELL + (CELL - 1) / 2


def squares(positions: np.ndarray, sides: np.ndarray, colours: list, fill: np.ndarray) -> PatchCollection:
    """Create a square for each token.

    Parameters
    ----------
    positions : ndarray of int, shape (n, 2)
        (x, y) in cells of the finest grid.
    sides : ndarray of float, shape (n,)
        Pixels.
    colours : list of n colours
    fill : ndarray of float, shape (n,)
        Opacity of the inside, 0..1.

    Returns
    -------
    PatchCollection
        Wide ones first, so that fine ones lie on top.
    """
    order = np.argsort(-sides, kind="stable")
    corners = centres(positions) - sides[:, None] / 2
    shapes = [Rectangle(corners[i], sides[i], sides[i]) for i in order]
    faces = [to_rgba(colours[i], fill[i]) for i in order]
    return PatchCollection(shapes, facecolors=faces, edgecolors=[colours[i] for i in order], linewidths=0.6)


def draw_tokens(axes, picture: np.ndarray, positions: np.ndarray, strides: np.ndarray, size=None) -> None:
    """Draw tokens over a faded picture: a dot in its cell, and a square as wide as the local stride.

    Parameters
    ----------
    axes : Axes
    picture : ndarray of uint8, shape (H, W, 3)
    positions : ndarray of int, shape (n, 2)
    strides : ndarray of int, shape (n,)
        Cells of the finest grid.
    size : tuple of int, optional
        Height and width in pixels of what the positions are in, if the picture is a smaller copy of it.
    """
    height, width = size or picture.shape[:2]
    axes.imshow(faded(picture), extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    colours = [STRIDES.get(stride, WIDER) for stride in strides.tolist()]
    wide = np.flatnonzero(strides > 1)
    frames = positions[wide], strides[wide] * CELL - 1.0, [colours[i] for i in wide], 0.4 / strides[wide]
    axes.add_collection(squares(*frames))
    axes.add_collection(squares(positions, np.full(len(positions), DOT), colours, np.ones(len(positions))))
    bare(axes, np.broadcast_to(0, (height, width)))


def draw_clusters(axes, picture: np.ndarray, positions: np.ndarray, cluster: np.ndarray) -> None:
    """Draw each cluster as a star: its tokens in one colour, joined to their centre."""
    axes.imshow(faded(picture))
    points = centres(positions)
    sums = np.stack([np.bincount(cluster, weights=points[:, axis]) for axis in (0, 1)], axis=1)
    middles = sums / np.bincount(cluster)[:, None]
    colours = [CLUSTERS[number % len(CLUSTERS)] for number in cluster.tolist()]
    axes.add_collection(LineCollection(np.stack([points, middles[cluster]], axis=1), colors=colours, linewidths=1.0))
    axes.add_collection(squares(positions, np.full(len(points), DOT), colours, np.ones(len(points))))
    bare(axes, picture)


def bare(axes, picture: np.ndarray) -> None:
    """Take ticks away and keep the picture's frame."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlim(-0.5, picture.shape[1] - 0.5)
    axes.set_ylim(picture.shape[0] - 0.5, -0.5)


def stride_legend(figure: Figure, present: set[int]) -> None:
    """Explain the squares' colours below the figure."""
    marks = [Patch(color=STRIDES[stride], label=f"{CELL * stride} px") for stride in STRIDES if stride in present]
    if max(present) > max(STRIDES):
        marks.append(Patch(facecolor=WIDER, edgecolor="black", label=f"over {CELL * max(STRIDES)} px"))
    figure.legend(
        handles=marks, title="a square's side: distance to the nearest token, rounded up to a power of 2",
        loc="lower center", ncols=len(marks), frameon=False,
    )  # fmt: skip


def draw_stages(picture: np.ndarray, stages: list[dict], title: str) -> Figure:
    """Draw one column a stage: tokens above, clusters below.

    Parameters
    ----------
    picture : ndarray of uint8, shape (H, W, 3)
    stages : list of dict
        positions (n, 2), strides (n,) and cluster (n,), arrays of int.
    title : str

    Returns
    -------
    Figure
    """
    width, shape = 4.2, picture.shape[0] / picture.shape[1]
    figure = Figure(figsize=(width * len(stages), 2 * width * shape + 1.6), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.06, 1, 0.94))
    figure.suptitle(title)
    rows = figure.subplots(2, len(stages), squeeze=False)
    cells = stages[0]["positions"].shape[0]
    for number, (stage, above, below) in enumerate(zip(stages, *rows, strict=True), start=1):
        count = len(stage["positions"])
        draw_tokens(above, picture, stage["positions"], stage["strides"])
        above.set_title(f"stage {number}: {count:,} tokens ({100 * count / cells:.3g} % of the grid)")
        draw_clusters(below, picture, stage["positions"], stage["cluster"])
        below.set_title(f"stage {number}: {stage['cluster'].max() + 1:,} clusters")
    stride_legend(figure, set(np.concatenate([stage["strides"] for stage in stages]).tolist()))
    return figure
