"""Look through a segmentation data set and say what it holds, what is wrong with it and what to do.

    python -m train.check_data PATH    ADE20K, Cityscapes, COCO, Pascal VOC, labelme, or a folder of images/ and masks/
    python -m train.check_data objects.json --images PICTURES

Exit code 0: all can be used; 1: some files cannot; 2: no data set was found.
"""

import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .common.errors import Parser, UserError, run_command
from .data.formats import KINDS, guess, open_source
from .data.images import ImageError
from .data.sample import TASKS
from .data.segmentation_dataset import SegmentationDataset
from .data.statistics import Census, class_table, complaints, remarks, summary


def count(source, split: str, limit: int | None) -> Census:
    """Read a split, or ``limit`` pictures spread evenly over it, and count what is there.

    Parameters
    ----------
    source : object
        See :mod:`train.data.sample`.
    split : str
        For the progress bar.
    limit : int or None

    Returns
    -------
    Census
    """
    census, samples = Census(source.vocabulary), SegmentationDataset(source, None, 0, "stop")
    for error in getattr(source, "problems", list)():
        census.note(error)
    chosen = np.unique(np.linspace(0, len(source) - 1, min(limit or len(source), len(source))).round().astype(int))
    for index in tqdm(chosen.tolist(), split, unit="picture", leave=False, disable=None):
        try:
            census.add(samples.read(index)[0])
        except ImageError as error:
            census.note(error)
    return census


def open_splits(options) -> dict:
    """Open the splits there are; a json is one."""
    path, kind = Path(options.path), options.kind or guess(Path(options.path))
    images = Path(options.images) if options.images else None
    if path.suffix == ".json":
        return {path.stem: open_source(path, "train", options.task, kind, images, boxes=options.boxes)}
    sources, missing = {}, []
    for split in ("train", "val"):
        try:
            sources[split] = open_source(path, split, options.task, kind, images, boxes=options.boxes)
        except UserError as error:
            missing.append(f"{split}: {error}")
    if not sources:
        raise UserError(missing[0].partition(": ")[2])
    for line in missing:
        print(f"note: no {line}")
    return sources


def main(arguments: list[str]) -> int:
    """Run the command."""
    parser = Parser("train.check_data", __doc__)
    parser.add_argument("path", help="folder of a data set, a COCO json, or the word digits")
    parser.add_argument("--kind", choices=KINDS, help="layout, if it is not to be guessed")
    parser.add_argument("--task", choices=TASKS, help="what to read; default: the richest there is")
    parser.add_argument("--images", help="folder of a json's pictures")
    parser.add_argument("--boxes", action="store_true", help="objects without an outline have their box for a mask")
    parser.add_argument("--limit", type=int, help="pictures of each split to look at, spread evenly; default: all")
    options = parser.parse_args(arguments)
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit must be at least 1, got {options.limit}")
    sources = open_splits(options)
    first = next(iter(sources.values()))
    kind = options.kind or guess(Path(options.path))
    print(f"{options.path}: {kind} data for {first.task} segmentation, {first.vocabulary.num_classes} classes")
    censuses = {split: count(source, split, options.limit) for split, source in sources.items()}
    for note in dict.fromkeys(note for source in sources.values() for note in getattr(source, "notes", ())):
        print(f"note: {note}")
    report(censuses)
    return int(any(census.troubles for census in censuses.values()))


def report(censuses: dict[str, Census]) -> None:
    """Print the counts, then what is worth knowing, then what is wrong."""
    lines = [summary(split, census) for split, census in censuses.items()] + class_table(censuses)
    for describe in (remarks, complaints):
        lines += [line for split, census in censuses.items() for line in describe(split, census)]
    bad = sum(trouble.count for census in censuses.values() for trouble in census.troubles.values())
    lines.append(f"{bad} problems: mend them, or train with on_bad_image skip" if bad else "all of it can be used")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(run_command(main))
