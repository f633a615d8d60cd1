"""Cityscapes: 19 classes, 8 of them countable, from the official leftImg8bit/ and gtFine/."""

from pathlib import Path

from ..common.errors import UserError
from .category_maps import CategoryMap, MaskSource
from .coco import PanopticSource
from .sample import ClassInfo, Vocabulary

PICTURE = "_leftImg8bit.png"


def open_cityscapes(root: Path, split: str, task: str):
    """Open a split.

    Masks are read from gtFine's labelIds (semantic) or instanceIds (instance and panoptic); where the latter are
    absent, panoptic ones from cityscapes_panoptic_{split}.json and its PNG files, which hold the same.

    Parameters
    ----------
    root : Path
        Folder of leftImg8bit/ and gtFine/.
    split : {"train", "val"}
    task : {"semantic", "instance", "panoptic"}

    Raises
    ------
    UserError
        There are no pictures.
    """
    pictures = sorted((root / "leftImg8bit" / split).glob(f"*/*{PICTURE}"))
    if not pictures:
        raise UserError(f"no pictures {root}/leftImg8bit/{split}/*/*{PICTURE}: unpack leftImg8bit and gtFine there")
    if task == "panoptic" and not any((root / "gtFine" / split).glob("*/*_instanceIds.png")):
        return open_panoptic_json(root, split)
    suffix = "labelIds" if task == "semantic" else "instanceIds"
    names = [path.name.removesuffix(PICTURE) for path in pictures]
    masks = [root / "gtFine" / split / name.split("_")[0] / f"{name}_gtFine_{suffix}.png" for name in names]
    return MaskSource(list(zip(names, pictures, masks, strict=True)), category_map(task), task)


def open_panoptic_json(root: Path, split: str) -> PanopticSource:
    """Open the masks that the official tools write in COCO's panoptic form."""
    folder = root / "gtFine" / f"cityscapes_panoptic_{split}"
    source = PanopticSource(folder.with_suffix(".json"), folder, root / "leftImg8bit" / split, vocabulary("panoptic"))
    for image in source.images:
        name = str(image["id"])
        image["file_name"] = f"{name.split('_')[0]}/{name}{PICTURE}"
    return source


def vocabulary(task: str) -> Vocabulary:
    """Return the classes in the order of their training numbers: 19, or for instances the 8 countable ones."""
    from cityscapesscripts.helpers.labels import labels

    evaluated = [label for label in labels if not label.ignoreInEval and (label.hasInstances or task != "instance")]
    classes = [ClassInfo(each.name, each.id, each.hasInstances, each.color) for each in evaluated]
    return Vocabulary(tuple(classes), "cityscapes")


def category_map(task: str) -> CategoryMap:
    """Return what the numbers of the masks mean."""
    from cityscapesscripts.helpers.labels import labels

    classes = vocabulary(task)
    ignored = frozenset(label.id for label in labels if label.ignoreInEval and label.id >= 0)
    background = frozenset(label.id for label in labels if not label.ignoreInEval) - classes.label_of.keys()
    advice = "use the masks of gtFine as they are (labelIds and instanceIds, not labelTrainIds)"
    return CategoryMap(classes, ignored, background, numbered=task != "semantic", advice=advice)
