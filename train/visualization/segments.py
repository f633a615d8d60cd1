"""Predictions as pictures and as plain data: overlays with names and scores, and what a JSON file holds."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from PIL import Image

from ..data.masks import area, box, decode, encode
from ..data.sample import Sample, Vocabulary
from .tokens import bare, draw_tokens, stride_legend

OPACITY = 0.5
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")  # Okabe and Ito
DRAWN = 1024  # pixels of a drawing's longer side; of larger pictures every n-th pixel is drawn
NEAR_EDGE = 0.08  # share of the picture's side within which names are not centred on their segments
SMALLEST_NAMED = 0.0004  # share of the picture from which a segment's name is written


def list_segments(task: str, prediction, vocabulary: Vocabulary, least: float) -> list[dict]:
    """List what a prediction shows, as plain data.

    Parameters
    ----------
    task : str
    prediction : ndarray, list of Instance, or Panoptic
    vocabulary : Vocabulary
    least : float
        Instances with lower scores are left out.

    Returns
    -------
    list of dict
        Each with id, label (place in the vocabulary), category_id (in the data set's files), name, is_thing, color
        (the class's own, or None), score (None for semantic maps), area in pixels, box [x, y, width, height] and
        segmentation (COCO's run lengths).
    """
    if task == "instance":
        shown = [each for each in prediction if each.score >= least and area(each.rle)]
        parts = [(number, each.label, each.score, each.rle) for number, each in enumerate(shown, 1)]
    elif task == "panoptic":
        parts = [(each.id, each.label, each.score, encode(prediction.map == each.id)) for each in prediction.segments]
    else:
        present = np.unique(prediction).tolist()
        parts = [(place, label, None, encode(prediction == label)) for place, label in enumerate(present, 1)]
    return [describe_segment(*part, vocabulary) for part in parts]


def target_segments(sample: Sample, vocabulary: Vocabulary) -> list[dict]:
    """List a sample's masks as ``list_segments`` does; there are no scores."""
    masks = zip(sample.labels.tolist(), sample.masks, strict=True)
    parts = [(number, label, None, encode(mask)) for number, (label, mask) in enumerate(masks, 1) if mask.any()]
    return [describe_segment(*part, vocabulary) for part in parts]


def describe_segment(number: int, label: int, score: float | None, rle: dict, vocabulary: Vocabulary) -> dict:
    """Write one segment as plain data."""
    info = vocabulary.classes[label]
    return {
        "id": number,
        "label": label,
        "category_id": info.id,
        "name": info.name,
        "is_thing": info.is_thing,
        "color": info.color,
        "score": score,
        "area": area(rle),
        "box": box(decode(rle)),
        "segmentation": rle,
    }


def colour_of(number: int) -> np.ndarray:
    """Return the n-th segment's colour, (3,) float from 0 to 1: eight in turn, then darker ones."""
    text, shade = COLOURS[number % len(COLOURS)], 1 / (1 + 0.4 * (number // len(COLOURS) % 3))
    return np.array([int(text[i : i + 2], 16) for i in (1, 3, 5)]) / 255 * shade


def overlay(picture: np.ndarray, segments: list[dict], step: int = 1) -> np.ndarray:
    """Lay the classes' colours, or else the segments', over a picture (H, W, 3) uint8, the smaller over the larger.

    The picture may be each ``step``-th pixel of the one that the segments are of.
    """
    result = picture.astype(np.float32) / 255
    for each in sorted(segments, key=lambda segment: -segment["area"]):
        mask = decode(each["segmentation"])[::step, ::step]
        colour = np.array(each["color"]) / 255 if each["color"] else colour_of(each["id"] - 1)
        result[mask] = (1 - OPACITY) * result[mask] + OPACITY * colour
    return np.rint(255 * result).astype(np.uint8)


def draw_outline(axes, mask: np.ndarray) -> None:
    """Draw a line around a mask (H, W), white on black, to be seen on any picture."""
    left, top, width, height = box(mask)
    part = np.pad(mask[top : top + height, left : left + width], 1).astype(np.float32)
    columns, rows = np.arange(left - 1, left + width + 1), np.arange(top - 1, top + height + 1)
    line = axes.contour(columns, rows, part, levels=[0.5], colors="white", linewidths=0.6)
    line.set_path_effects([withStroke(linewidth=1.8, foreground="black")])


def draw_segments(axes, picture: np.ndarray, segments: list[dict], size: float = 8) -> None:
    """Draw an overlay and write each segment's name and score at a place inside it; of one class, scores alone."""
    only_scores = len({each["name"] for each in segments}) == 1 and all(each["score"] is not None for each in segments)
    step = -(-max(picture.shape[:2]) // DRAWN)
    picture = picture[::step, ::step]
    axes.imshow(overlay(picture, segments, step))
    for each in segments:
        mask = decode(each["segmentation"])[::step, ::step]
        if not mask.any():
            continue
        draw_outline(axes, mask)
        if each["area"] < SMALLEST_NAMED * mask.size * step**2:
            continue
        x, y = middle(mask)
        score = "" if each["score"] is None else f"{100 * each['score']:.0f}"
        text = score if only_scores else f"{each['name']} {score}".strip()
        frame = {"facecolor": "black", "alpha": 0.6, "edgecolor": "none", "pad": 1}
        ha, va = (side_of(x / mask.shape[1], "left", "right"), side_of(y / mask.shape[0], "top", "bottom"))
        axes.text(x, y, text, color="white", fontsize=size, ha=ha, va=va, bbox=frame, clip_on=True)
    bare(axes, picture)


def side_of(place: float, first: str, last: str) -> str:
    """Return how a name is aligned at a place from 0 to 1 of an axis, so that no edge of the picture cuts it off."""
    return first if place < NEAR_EDGE else last if place > 1 - NEAR_EDGE else "center"


def count_of(segments: list[dict]) -> str:
    """Return how many segments there are, and of what if of one class, whose name is then not written on them."""
    names = {each["name"] for each in segments}
    return f"{len(segments)} segments" + (f": {names.pop()}" if len(names) == 1 else "")


def middle(mask: np.ndarray) -> tuple[int, int]:
    """Return a pixel (x, y) of a mask: the one nearest to its centre of mass."""
    left, top, width, height = box(mask)
    rows, columns = np.nonzero(mask[top : top + height, left : left + width])
    nearest = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
    return left + int(columns[nearest]), top + int(rows[nearest])


def draw_result(picture: np.ndarray, segments: list[dict], stages: list[dict], inner: tuple[int, int], title: str):
    """Draw the overlay, and beside it the tokens that each merge kept.

    Parameters
    ----------
    picture : ndarray of uint8, shape (H, W, 3)
    segments : list of dict
        Of ``list_segments``.
    stages : list of dict
        Positions (n, 2) and strides (n,) of every stage, as ``train.inference.classification.find_tokens`` gives them.
    inner : tuple of int
        Height and width at which the network saw the picture.
    title : str

    Returns
    -------
    Figure
    """
    step = -(-max(inner) // DRAWN)
    small = max(1, inner[1] // step), max(1, inner[0] // step)
    seen = np.asarray(Image.fromarray(picture).resize(small, Image.Resampling.BILINEAR))
    shape = min(4.0, max(0.25, picture.shape[0] / picture.shape[1]))
    width = 6.5 if shape <= 1 else 6.5 / shape
    figure = Figure(figsize=(2 * max(width, 3.0), 2 * max(width * shape, 2.2) + 1.3), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.08, 1, 0.92))
    figure.suptitle(title)
    first, *others = figure.subplots(2, 2).flat
    draw_segments(first, picture, segments)
    first.set_title(count_of(segments))
    for number, (axes, stage) in enumerate(zip(others, stages[1:], strict=True), 1):
        draw_tokens(axes, seen, stage["positions"], stage["strides"], inner)
        axes.set_title(f"merge {number} kept {len(stage['positions']):,} tokens")
    stride_legend(figure, set(np.concatenate([stage["strides"] for stage in stages[1:]]).tolist()))
    return figure
