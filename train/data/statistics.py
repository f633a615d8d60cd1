"""Counting what a data set holds, and putting the counts on one screen."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .images import ImageError
from .mask_files import DataError
from .sample import Sample, Vocabulary
from .segmentation_transforms import SMALLEST

ROWS = 16  # classes shown; of more, the most and the least frequent
SLENDER = 20  # a picture so many times as long as wide is worth a word


@dataclass
class Trouble:
    """One kind of trouble: in how many files, the first one's message, and the unknown ids of all."""

    count: int
    first: str
    ids: Counter


@dataclass
class Census:
    """Counts over one split.

    Parameters
    ----------
    vocabulary : Vocabulary
    """

    vocabulary: Vocabulary
    sizes: list[tuple[int, int]] = field(default_factory=list)  # (height, width) of each picture
    crowds: int = 0
    ignored: int = 0  # pixels
    empty: list[str] = field(default_factory=list)  # the picture of each mask without a pixel
    bare: int = 0  # pictures without any mask
    troubles: dict[str, Trouble] = field(default_factory=dict)

    def __post_init__(self):
        self.pictures, self.objects, self.pixels = np.zeros((3, self.vocabulary.num_classes), dtype=np.int64)

    def add(self, sample: Sample) -> None:
        """Count one sample."""
        areas = sample.masks.sum(axis=(1, 2))
        self.sizes.append(sample.image.shape[:2])
        self.crowds += int(sample.crowd.sum())
        self.ignored += int(sample.ignore.sum())
        self.bare += len(areas) == 0
        self.empty += [sample.name] * int((areas == 0).sum())
        np.add.at(self.objects, sample.labels, areas > 0)
        np.add.at(self.pixels, sample.labels, areas)
        self.pictures[np.unique(sample.labels[areas > 0])] += 1

    def note(self, error: ImageError) -> None:
        """Count one file that cannot be used."""
        kind = error.kind if isinstance(error, DataError) else "unusable file"
        trouble = self.troubles.setdefault(kind, Trouble(0, str(error), Counter()))
        trouble.count += 1
        trouble.ids.update(error.ids if isinstance(error, DataError) else {})

    @property
    def area(self) -> int:
        """Pixels of all pictures."""
        return sum(height * width for height, width in self.sizes)


def summary(split: str, census: Census) -> str:
    """Describe a split's size in one line."""
    if not census.sizes:
        return f"{split}: no picture could be used"
    small, large = (pick(census.sizes, key=lambda size: size[0] * size[1]) for pick in (min, max))
    sizes = " to ".join(dict.fromkeys(f"{width} x {height}" for height, width in (small, large)))
    parts = [f"{len(census.sizes)} pictures of {sizes} pixels"]
    parts += [f"{census.objects.sum()} masks", f"{100 * census.ignored / census.area:.1f} % of the pixels ignored"]
    parts += [f"{census.crowds} crowds"] * bool(census.crowds)
    return f"{split}: {', '.join(parts)}"


def class_table(censuses: dict[str, Census]) -> list[str]:
    """List the classes: pictures they are in, masks and share of the pixels, over all splits."""
    every = list(censuses.values())
    objects, pixels, pictures = (sum(getattr(c, key) for c in every) for key in ("objects", "pixels", "pictures"))
    area = max(1, sum(census.area for census in every))
    order = np.argsort(-pixels, kind="stable")
    seen = [label for label in order if objects[label]]
    shown = seen if len(seen) <= ROWS else [*seen[: ROWS // 2], None, *seen[-ROWS // 2 :]]
    lines = [f"{'class':28} {'kind':6} {'pictures':>8} {'masks':>8} {'pixels':>8}"]
    for label in shown:
        if label is None:
            lines.append(f"... {len(seen) - ROWS} more")
            continue
        info = every[0].vocabulary.classes[label]
        kind, share = "thing" if info.is_thing else "stuff", 100 * pixels[label] / area
        lines.append(f"{info.name[:28]:28} {kind:6} {pictures[label]:8} {objects[label]:8} {share:6.2f} %")
    unseen = [info.name for info, count in zip(every[0].vocabulary.classes, objects, strict=True) if not count]
    if unseen:
        more = ", ..." if len(unseen) > 8 else ""
        lines.append(f"never met: {len(unseen)} of {len(objects)} classes ({', '.join(unseen[:8])}{more})")
    return lines


def remarks(split: str, census: Census) -> list[str]:
    """List what is worth knowing though training copes with it."""
    lines = []
    if census.empty:
        lines.append(f"{len(census.empty)} masks without a pixel (first: {census.empty[0]}): training leaves them out")
    if census.bare:
        lines.append(f"{census.bare} pictures without any mask: kept, as examples of nothing")
    if census.area and census.ignored > census.area / 2:
        lines.append("more than half of the pixels are ignored: see whether the ignored ids are meant to be")
    small = sum(min(size) < SMALLEST for size in census.sizes)
    if small:
        lines.append(f"{small} pictures have a side below {SMALLEST} pixels: they are filled up")
    slender = sum(max(size) > SLENDER * min(size) for size in census.sizes)
    if slender:
        lines.append(f"{slender} pictures are more than {SLENDER} times as long as wide: see whether they are cut off")
    return [f"note ({split}): {line}" for line in lines]


def complaints(split: str, census: Census) -> list[str]:
    """List the troubles: how many files, the first one, and what to do."""
    lines = []
    for kind, trouble in census.troubles.items():
        lines.append(f"PROBLEM ({split}): {kind}, {trouble.count} x; the first: {trouble.first}")
        if trouble.ids:
            listed = ", ".join(f"{i} ({count} pixels)" for i, count in trouble.ids.most_common(8))
            lines.append(f"    unknown ids in all: {listed}{', ...' * (len(trouble.ids) > 8)}")
    return lines
