"""Convert public data sets to the json files and folders that train.segment reads.

    python -m train.prepare nuclei DOWNLOAD OUT                      the 2018 Data Science Bowl's stage-1 training set
    python -m train.prepare masks DOWNLOAD OUT --category NAME       any other tree of one mask file an object

DOWNLOAD is a folder or a .zip that holds, at any depth, NAME/images/*.png and NAME/masks/*.png: one picture, and a mask
for each of its objects, whose pixels are not zero. OUT is made: train.json, val.json and test.json in COCO's form
(compressed run lengths), and the pictures as 8-bit RGB in train/, val/ and test/. The CRC-32 of NAME modulo 10 chooses
the split, 0: test, 1: val, the rest: train, so that everyone gets the same ones. NAME is cut to 16 characters in OUT.
"""

import io
import json
import os
import shutil
import sys
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from tqdm import tqdm

from .common.errors import Parser, UserError, one_line, run_command
from .data.mask_files import read_mask, read_picture
from .data.masks import box, encode

SPLITS = ("train", "val", "test")
CATEGORIES = {"nuclei": "nucleus"}
LONGEST = {"nuclei": 1100}
LAYOUT = "expected NAME/images/*.png with NAME/masks/*.png, one mask file an object, in a folder or a .zip"
SHORT = 16  # characters of a name in the output
MOST_BYTES = 1 << 30  # of one file in an archive


def split_of(name: str) -> str:
    """Choose the split of a picture by its original name."""
    return {0: "test", 1: "val"}.get(zlib.crc32(name.encode()) % 10, "train")


class Member(io.BytesIO):
    """A file of an archive, in memory, which messages call by its name."""

    def __init__(self, content: bytes, name: str):
        super().__init__(content)
        self.called = name

    def __str__(self):
        return self.called


class Tree:
    """The files of a folder or a .zip; nothing is unpacked.

    Parameters
    ----------
    path : Path

    Raises
    ------
    UserError
        It is neither.
    """

    def __init__(self, path: Path):
        self.path, self.archive = path, None
        if path.is_dir():
            files = (Path(folder) / name for folder, _, names in os.walk(path, followlinks=True) for name in names)
            self.names = sorted(file.relative_to(path).as_posix() for file in files if file.is_file())
            return
        try:
            self.archive = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is no folder and no .zip ({one_line(error)}): {LAYOUT}") from error
        self.names = sorted(info.filename for info in self.archive.infolist() if not info.is_dir())

    def open(self, name: str):
        """Return what ``read_picture`` and ``read_mask`` take: a path, or a file in memory."""
        if self.archive is None:
            return self.path / name
        info = self.archive.getinfo(name)
        if info.file_size > MOST_BYTES:
            raise UserError(f"{self.path}: {name} unpacks to {info.file_size:,} bytes: remove it from the archive")
        try:
            return Member(self.archive.read(info), f"{self.path}/{name}")
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, OSError, EOFError) as error:
            raise UserError(f"{self.path}: cannot unpack {name} ({one_line(error)}): download it again") from error

    def items(self) -> dict[str, tuple[list[str], list[str]]]:
        """List the pictures and masks of each NAME, sorted; hidden files and those of other folders are no part."""
        found = {}
        for file in self.names:
            parts = PurePosixPath(file).parts
            hidden = any(part.startswith((".", "__MACOSX")) for part in parts)
            if len(parts) < 3 or parts[-2] not in ("images", "masks") or not file.lower().endswith(".png") or hidden:
                continue
            found.setdefault("/".join(parts[:-2]), ([], []))[parts[-2] == "masks"].append(file)
        return dict(sorted(found.items()))


@dataclass
class Split:
    """One split on its way to a json."""

    images: list[dict] = field(default_factory=list)
    annotations: list[dict] = field(default_factory=list)

    def add(self, file_name: str, size: tuple[int, int], masks: Iterator[np.ndarray]) -> None:
        """Append a picture and its objects; masks without a pixel are left out."""
        number = len(self.images) + 1
        self.images.append({"id": number, "file_name": file_name, "width": size[1], "height": size[0]})
        for mask in masks:
            if not mask.any():
                continue
            self.annotations.append({
                "id": len(self.annotations) + 1, "image_id": number, "category_id": 1, "iscrowd": 0,
                "area": int(mask.sum()), "bbox": box(mask), "segmentation": encode(mask),
            })  # fmt: skip


def convert(tree: Tree, out: Path, category: str, longest: int | None) -> tuple[dict[str, Split], list[str]]:
    """Write the pictures and jsons of a tree.

    Parameters
    ----------
    tree : Tree
    out : Path
        Folder, empty.
    category : str
        Name of the one class.
    longest : int, optional
        Pictures with a longer side are left out.

    Returns
    -------
    splits : dict of str to Split
    left_out : list of str
        A line for each picture that was left out.

    Raises
    ------
    UserError
        No picture of that layout, or one that cannot be used; the message names it.
    """
    splits, left_out, items = {split: Split() for split in SPLITS}, [], tree.items()
    names = {item: item.rpartition("/")[2] for item in items}
    short = {item: name[:SHORT] for item, name in names.items()}
    if len(set(short.values())) < len(short):
        short = names
    if len(set(short.values())) < len(short):
        twice = next(name for name in names.values() if list(names.values()).count(name) > 1)
        raise UserError(f"{tree.path} holds {twice} in two folders: remove one")
    for split in SPLITS:
        (out / split).mkdir()
    for item, (pictures, masks) in tqdm(items.items(), unit="picture", leave=False, disable=None):
        if len(pictures) != 1 or not masks:
            left_out.append(f"{item}: {len(pictures)} pictures and {len(masks)} masks, not one and some")
            continue
        picture = read_picture(tree.open(pictures[0]))
        height, width = picture.shape[:2]
        if longest and max(height, width) > longest:
            left_out.append(f"{item}: {width} x {height} pixels, more than {longest}")
            continue
        split, file_name = split_of(names[item]), f"{short[item]}.png"
        read = (read_object(tree.open(mask), (height, width)) for mask in masks)
        splits[split].add(file_name, (height, width), read)
        Image.fromarray(picture).save(out / split / file_name)
    if not any(split.images for split in splits.values()):
        raise UserError(f"no picture with masks in {tree.path}{f' ({left_out[0]})' if left_out else ''}: {LAYOUT}")
    for split, content in splits.items():
        listed = {**vars(content), "categories": [{"id": 1, "name": category}]}
        (out / f"{split}.json").write_text(json.dumps(listed, separators=(",", ":")), encoding="utf-8")
    return splits, left_out


def read_object(file, size: tuple[int, int]) -> np.ndarray:
    """Read one object's mask, (H, W) bool, which must have its picture's size."""
    mask = read_mask(file)
    if mask.shape != size:
        have, want = (f"{width} x {height}" for height, width in (mask.shape, size))
        raise UserError(f"mask {file} is {have}, its picture {want}: export both at one size")
    return mask


def main(arguments: list[str]) -> int:
    """Run the command."""
    parser = Parser("train.prepare", __doc__)
    parser.add_argument("kind", choices=("nuclei", "masks"), help="nuclei: category nucleus, longest side 1100")
    parser.add_argument("download", help="folder or .zip")
    parser.add_argument("out", help="folder to make; must not exist, or be empty")
    parser.add_argument("--category", help="name of the objects' one class")
    parser.add_argument("--longest", type=int, help="leave out pictures with a longer side, pixels")
    options = parser.parse_args(arguments)
    category = options.category or CATEGORIES.get(options.kind)
    if not category:
        raise UserError("name what the masks show: --category NAME")
    out, tree = Path(options.out).resolve(), Tree(Path(options.download))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty: name a new folder; nothing is written over")
    draft = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        draft.mkdir(parents=True)
        splits, left_out = convert(tree, draft, category, options.longest or LONGEST.get(options.kind))
        os.replace(draft, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {one_line(error)}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    for line in left_out:
        print(f"left out {line}")
    for split, content in splits.items():
        print(f"{split}: {len(content.images)} pictures, {len(content.annotations):,} objects")
    print(f"written to {out}, {len(left_out)} pictures left out; now: python -m train.check_data {out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
