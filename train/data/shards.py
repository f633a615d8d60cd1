"""Images in WebDataset tar shards, read at random places.

A shard is a tar file of pairs ``key.jpg`` and ``key.cls`` (the class number as text). All headers are read once; then
an image is one ``seek`` and one ``read``, so that any sample can be had at any time, as a resumed run needs. Shards may
lie in several folders, that is on several disks. An epoch's order keeps neighbours in neighbouring shards: shards are
permuted, and images shuffled within blocks of a few shards, so that disks read nearby data.
"""

import io
import re
import tarfile
from glob import glob
from pathlib import Path

import numpy as np
from braceexpand import braceexpand

from ..common.errors import UserError, one_line
from .images import open_rgb

MOST_SHARDS = 100_000  # of one pattern
LONGEST_NUMBER = 18  # bytes of a .cls
RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}")
IMAGES = ("jpg", "jpeg", "png", "webp", "ppm")


class Shards:
    """Map-style access to the samples of tar shards.

    Parameters
    ----------
    patterns : list of str
        Shard files, folders of them, with ``{000..127}`` and ``*`` expanded.
    block : int
        Shards whose images are mixed with one another.
    num_classes : int
        Labels must be below it.
    """

    def __init__(self, patterns: list[str], block: int, num_classes: int):
        self.paths = expand(patterns)
        self.block, self.num_classes = block, num_classes
        shards = [read_index(path) for path in self.paths]
        self.keys = [key for keys, _ in shards for key in keys]
        self.places = np.concatenate([places for _, places in shards])  # (n, 3): offset, size, label
        self.starts = np.cumsum([0] + [len(keys) for keys, _ in shards])  # first sample of each shard, and the end
        self.check_labels()

    def check_labels(self) -> None:
        """Refuse labels that the model has no output for."""
        wrong = np.flatnonzero((self.places[:, 2] < 0) | (self.places[:, 2] >= self.num_classes))
        if len(wrong):
            label, name = self.places[wrong[0], 2], self.name(wrong[0])
            raise UserError(f"{name} has class {label}, but model.num_classes is {self.num_classes}")

    def __len__(self):
        return len(self.keys)

    def shard_of(self, index: int) -> int:
        """Return the number of the shard that holds a sample."""
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def name(self, index: int) -> str:
        """Return shard and key of a sample."""
        return f"{self.paths[self.shard_of(index)]}:{self.keys[index]}"

    def load(self, index: int, epoch: int = 0):
        """Read a sample, the same in every epoch: (RGB picture, class number)."""
        offset, size, label = self.places[index].tolist()
        with open(self.paths[self.shard_of(index)], "rb") as file:
            file.seek(offset)
            content = file.read(size)
        return open_rgb(io.BytesIO(content)), label

    def order(self, generator: np.random.Generator) -> np.ndarray:
        """Draw one epoch's order, (n,) int64: shards permuted, then images shuffled within each block of shards."""
        shards = generator.permutation(len(self.paths))
        blocks = []
        for first in range(0, len(shards), self.block):
            chosen = shards[first : first + self.block]
            samples = np.concatenate([np.arange(self.starts[shard], self.starts[shard + 1]) for shard in chosen])
            blocks.append(generator.permutation(samples))
        return np.concatenate(blocks)


def expand(patterns: list[str]) -> list[str]:
    """List the shard files of patterns and folders, sorted within each pattern."""
    paths = []
    for pattern in patterns:
        found = []
        try:
            if most_names(pattern) > MOST_SHARDS:
                raise ValueError(f"it stands for more than {MOST_SHARDS:,} files")
            names = list(braceexpand(pattern))
        except ValueError as error:
            raise UserError(
                f"shard pattern {pattern}: {one_line(error)}; write such as train-{{000..127}}.tar"
            ) from error
        for name in names:
            found += sorted(glob(f"{name}/*.tar") if Path(name).is_dir() else glob(name))
        if not found:
            raise UserError(f"no shards at {pattern}: expected .tar files, or a folder of them")
        paths += found
    return paths


def most_names(pattern: str) -> int:
    """Return a bound on the names that a pattern stands for, without making them: the product over its braces."""
    count, commas = 1, []
    for start, end, step in RANGE.findall(pattern):
        count *= abs(int(end) - int(start)) // max(1, abs(int(step or 1))) + 1
    for character in pattern:
        if character == "{":
            commas.append(0)
        elif character == "," and commas:
            commas[-1] += 1
        elif character == "}" and commas:
            count *= commas.pop() + 1
    return count


def read_index(path: str):
    """Read a shard's table of contents.

    Parameters
    ----------
    path : str

    Returns
    -------
    keys : list of str
    places : ndarray of int64, shape (n, 3)
        Offset and size in bytes of each image, and its class.
    """
    if not Path(path).is_file():
        raise UserError(f"shard {path} is no file: remove it")
    images, labels = {}, {}
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                key, kind = split_key(member.name)
                if not member.isfile() or kind not in (*IMAGES, "cls"):
                    continue
                if member.issparse() or key in (labels if kind == "cls" else images):
                    raise ValueError(f"{member.name} is {'a sparse file' if member.issparse() else 'there twice'}")
                if kind == "cls":
                    labels[key] = read_class(shard.extractfile(member), member)
                else:
                    images[key] = member.offset_data, member.size
    except (tarfile.TarError, ValueError, OSError, EOFError) as error:
        raise UserError(f"cannot read shard {path}: {one_line(error)}") from error
    missing = images.keys() ^ labels.keys()
    if missing or not images:
        lacking = f"sample {min(missing)} lacks its image or its .cls" if missing else "no samples"
        raise UserError(f"shard {path}: {lacking}; expected pairs key.jpg and key.cls")
    return list(images), np.array([(*images[key], labels[key]) for key in images], dtype=np.int64)


def read_class(file, member: tarfile.TarInfo) -> int:
    """Read a class number."""
    text = file.read(LONGEST_NUMBER + 1)
    if not text.strip().isdigit() or len(text) > LONGEST_NUMBER:
        raise ValueError(f"{member.name} holds {text!r}, not the number of a class")
    return int(text)


def split_key(name: str) -> tuple[str, str]:
    """Split a member's name at the first dot of its last part, as WebDataset does: "a/b.c.jpg" -> ("a/b", "c.jpg")."""
    folder, slash, last = name.rpartition("/")
    stem, _, kind = last.partition(".")
    return folder + slash + stem, kind.lower()
