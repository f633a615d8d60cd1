"""ADE20K as the scene parsing challenge ships it (ADEChallengeData2016): 150 classes, 0 ignored."""

from pathlib import Path

from ..common.errors import UserError
from .category_maps import CategoryMap, MaskSource
from .coco_json import read_text
from .images import list_pictures
from .sample import ClassInfo, Vocabulary

CLASSES = 150
NAMES = "objectInfo150.txt"
FOLDERS = {"train": "training", "val": "validation"}


def open_ade20k(root: Path, split: str) -> MaskSource:
    """Open images/{training,validation} and annotations/{training,validation}.

    Parameters
    ----------
    root : Path
        ADEChallengeData2016.
    split : {"train", "val"}

    Raises
    ------
    UserError
        A folder or all pictures are missing.
    """
    images, masks = (root / kind / FOLDERS[split] for kind in ("images", "annotations"))
    pictures = list_pictures(images)
    if not pictures or not masks.is_dir():
        lacking = f"masks in {masks}" if pictures else f"pictures in {images}"
        raise UserError(f"no {lacking}: expected ADE20K's images/ and annotations/")
    files = [(path.stem, path, masks / f"{path.stem}.png") for path in pictures]
    advice = "annotations number the classes 1 to 150 and 0 for none: use those of ADEChallengeData2016"
    return MaskSource(files, CategoryMap(read_vocabulary(root / NAMES), frozenset([0]), advice=advice), "semantic")


def read_vocabulary(path: Path) -> Vocabulary:
    """Name the classes by the data set's own table, or by their numbers where it is absent."""
    names = read_names(path) if path.is_file() else {}
    numbers = range(1, CLASSES + 1)
    return Vocabulary(tuple(ClassInfo(names.get(i, f"class {i}"), i, False, None) for i in numbers), "ade20k")


def read_names(path: Path) -> dict[int, str]:
    """Read the first of each class's names from columns Idx and Name, apart by tabs."""
    rows = [line.split("\t") for line in read_text(path, "take the data set's").splitlines() if line.strip()]
    try:
        columns = [cell.strip() for cell in rows[0]]
        number, name = columns.index("Idx"), columns.index("Name")
        return {int(row[number]): row[name].split(",")[0].strip() for row in rows[1:]}
    except (ValueError, IndexError) as error:
        raise UserError(f"{path} is no table of Idx and Name with tabs: take the data set's, or remove it") from error
