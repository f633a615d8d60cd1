"""Miniature data sets in the official layouts, and what must be read from them."""

import json

import numpy as np
from PIL import Image
from pycocotools import mask as coco

SHAPE = (40, 60)


def write_png(path, values):
    """Write an array as a PNG, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values)).save(path)
    return path


def picture(seed, shape=SHAPE):
    """Make a picture (H, W, 3) uint8 unlike every other."""
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def bands(*values, dtype=np.uint8):
    """Make a mask of SHAPE with one upright band of equal width for each value."""
    edges = np.linspace(0, SHAPE[1], len(values) + 1).astype(int)
    ids = np.zeros(SHAPE, dtype=dtype)
    for value, first, last in zip(values, edges, edges[1:], strict=False):
        ids[:, first:last] = value
    return ids


def ade20k(root, ids, split="training"):
    """Write one picture and annotation for each mask."""
    for number, mask in enumerate(ids):
        name = f"ADE_{split}_{number:08}"
        path = root / "images" / split / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number)).save(path)
        write_png(root / "annotations" / split / f"{name}.png", mask)
    return root


def cityscapes(root, instance_ids, split="train"):
    """Write pictures with instanceIds, and labelIds that go with them."""
    for number, ids in enumerate(instance_ids):
        name = f"aachen_{number:06}_000019"
        write_png(root / "leftImg8bit" / split / "aachen" / f"{name}_leftImg8bit.png", picture(number))
        folder = root / "gtFine" / split / "aachen"
        write_png(folder / f"{name}_gtFine_instanceIds.png", ids.astype(np.uint16))
        labels = np.where(ids >= 1000, ids // 1000, ids).astype(np.uint8)
        write_png(folder / f"{name}_gtFine_labelIds.png", labels)
    return root


def folder(root, ids, classes=None):
    """Write images/ and masks/."""
    for number, mask in enumerate(ids):
        write_png(root / "images" / f"p{number:03}.png", picture(number))
        write_png(root / "masks" / f"p{number:03}.png", mask)
    if classes:
        (root / "classes.json").write_text(json.dumps(classes))
    return root


SQUARE = [10, 5, 30, 5, 30, 25, 10, 25]  # x 10 to 29, y 5 to 24
CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}]


def packed(mask):
    """Pack a mask as COCO does, with text counts."""
    rle = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}


def runs(mask):
    """Write a mask as plain run lengths."""
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flat]))) if flat.any() else []
    return {"size": list(mask.shape), "counts": np.diff([0, *edges, flat.size]).tolist()}


def instances(root, annotations, images=2, split="train"):
    """Write COCO's instance layout; each annotation is (image id, category id, segmentation, crowd)."""
    for number in range(images):
        write_png(root / f"{split}2017" / f"{number:012}.png", picture(number))
    listed = [{"id": i, "file_name": f"{i:012}.png", "height": 40, "width": 60} for i in range(images)]
    content = [
        {"id": 100 + n, "image_id": i, "category_id": c, "segmentation": s, "iscrowd": crowd}
        for n, (i, c, s, crowd) in enumerate(annotations)
    ]
    path = root / "annotations" / f"instances_{split}2017.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": listed, "annotations": content, "categories": CATEGORIES}))
    return root


def panoptic(root, ids, segments, split="train"):
    """Write COCO's panoptic layout for one picture; segments are (id, category id, crowd)."""
    write_png(root / f"{split}2017" / f"{7:012}.png", picture(7))
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=2).astype(np.uint8)
    write_png(root / "annotations" / f"panoptic_{split}2017" / f"{7:012}.png", colours)
    infos = [{"id": i, "category_id": c, "iscrowd": crowd} for i, c, crowd in segments]
    content = {
        "images": [{"id": 7, "file_name": f"{7:012}.png", "height": 40, "width": 60}],
        "annotations": [{"image_id": 7, "file_name": f"{7:012}.png", "segments_info": infos}],
        "categories": [
            {"id": 1, "name": "person", "isthing": 1, "color": [220, 20, 60]},
            {"id": 184, "name": "tree", "isthing": 0, "color": [107, 142, 35]},
        ],
    }
    (root / "annotations" / f"panoptic_{split}2017.json").write_text(json.dumps(content))
    return root
