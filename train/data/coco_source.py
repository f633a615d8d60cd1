"""What COCO's two kinds of json share: pictures, classes, and the annotations of each picture."""

import json
import os
from pathlib import Path

import numpy as np

from ..common.errors import UserError
from .coco_json import flag, other_type, read_json, read_vocabulary, shown
from .coco_layouts import find_pictures
from .mask_files import DataError, check_size, read_picture
from .sample import Vocabulary


class CocoSource:
    """What both kinds of file share: pictures, classes, and the annotations of each picture.

    Annotations are kept packed as json text, image by image, so that loader processes share the memory.

    Parameters
    ----------
    path : Path
        The json.
    pictures : Path, optional
        Folder of the pictures; by default looked for, see :mod:`train.data.coco_layouts`.
    vocabulary : Vocabulary, optional
        By default the file's categories, in the order of their ids.
    skip_empty : bool
        Leave out pictures without any annotation other than crowds, as the published training does.

    Raises
    ------
    UserError
        The file is missing, no json, or lacks what COCO's files have.
    """

    task: str
    masks: Path | None = None
    notes: list[str] = []

    def __init__(self, path: Path, pictures: Path | None, vocabulary: Vocabulary | None, skip_empty: bool):
        content = read_json(path)
        names = [image["file_name"] for image in content["images"]]
        self.path, self.pictures = path, pictures or find_pictures(path, names, self.masks)
        self.vocabulary = vocabulary or read_vocabulary(content["categories"], f"coco-{self.task}", path)
        grouped = {image["id"]: [] for image in content["images"]}
        self.homeless = [a["image_id"] for a in content["annotations"] if a["image_id"] not in grouped]
        for annotation in content["annotations"]:
            grouped.get(annotation["image_id"], []).append(annotation)
        self.objects = sum(self.has_object(annotation) for own in grouped.values() for annotation in own)
        self.outlined = sum(bool(a.get("segmentation")) for own in grouped.values() for a in own)
        self.annotated = sum(map(len, grouped.values()))
        self.images = [i for i in content["images"] if not skip_empty or any(map(self.has_object, grouped[i["id"]]))]
        if not self.images:
            raise UserError(f"{path}: {self.nothing()}")
        packed = [json.dumps(grouped[image["id"]]).encode() for image in self.images]
        self.ends = np.cumsum([0] + [len(each) for each in packed])
        self.packed = np.frombuffer(b"".join(packed), dtype=np.uint8)

    def __len__(self):
        return len(self.images)

    def name(self, index: int) -> str:
        """Return a picture's id."""
        return str(self.images[index]["id"])

    def order(self, generator: np.random.Generator) -> np.ndarray:
        """Draw one epoch's order of the pictures, (n,) int64."""
        return generator.permutation(len(self))

    def annotations(self, index: int) -> list[dict]:
        """Unpack a picture's annotations."""
        return json.loads(self.packed[self.ends[index] : self.ends[index + 1]].tobytes())

    def nothing(self) -> str:
        """Describe why there is nothing to learn."""
        if not self.annotated:
            return "no annotation is of an image that it lists: there is nothing to learn"
        return (
            f"all {self.annotated} annotations are marked iscrowd, and crowds are not trained on: "
            f"set iscrowd to 0 where one object is outlined"
        )

    def problems(self) -> list[DataError]:
        """List what is wrong with the file as a whole."""
        found = []
        if self.homeless:
            named = ", ".join(sorted({shown(each) for each in self.homeless})[:5])
            hint = other_type(self.homeless[0], [image["id"] for image in self.images])
            count = f"{self.path}: {len(self.homeless)} annotations"
            message = f"{count} are of images it does not list ({named}){hint}: remove them"
            found.append(DataError("annotations of unlisted images", message))
        if not self.objects:
            found.append(DataError("no object", f"{self.path}: {self.nothing()}"))
        return found

    @classmethod
    def has_object(cls, annotation: dict) -> bool:
        """Whether an annotation holds an object that is no crowd; a broken one does, to be named when it is read."""
        try:
            return cls.holds_object(annotation)
        except ValueError:
            return True

    def missing(self) -> list[int]:
        """List the numbers of the pictures that are not there."""
        return [i for i, image in enumerate(self.images) if not os.path.isfile(self.pictures / image["file_name"])]

    def find_picture(self, index: int) -> Path:
        """Return the path of a picture, or raise an error if it is not there."""
        image = self.images[index]
        path = self.pictures / image["file_name"]
        if not os.path.isfile(path):
            message = (
                f"no picture {path}, named in {self.path} (image id {image['id']}): fetch it, or name the folder of "
                f"pictures (--images; in training --data.images)"
            )
            raise DataError("missing picture", message)
        return path

    def read_picture(self, index: int) -> np.ndarray:
        """Read a picture, whose size must be what the json says."""
        image, path = self.images[index], self.find_picture(index)
        picture = read_picture(path)
        size = image["height"], image["width"]
        if size != picture.shape[:2] and size == picture.shape[1::-1]:
            message = f"{self.path}: image {image['id']} is {size[1]} x {size[0]}, but {path} is shown turned"
            advice = "save it turned, without its camera's orientation mark, and outline it so"
            raise DataError("mask and picture differ in size", f"{message}: {advice}")
        check_size(size, f"{self.path}: image {image['id']}", picture.shape[:2], path)
        return picture

    def label(self, annotation: dict, index: int) -> int:
        """Return the label of an annotation or segment, or raise an error if its category is unknown."""
        category = annotation.get("category_id")
        label_of = self.vocabulary.label_of
        if isinstance(category, int | float | str) and category in label_of:
            return label_of[category]
        hint = other_type(category, label_of) if isinstance(category, int | str) else ""
        raise DataError(
            "unknown category",
            f"{self.path}: annotation {shown(annotation.get('id'))} of image {self.name(index)} has category_id "
            f"{shown(category)}{hint}, which is not among its categories: add the category or correct the annotation",
        )

    def is_crowd(self, annotation: dict, index: int) -> bool:
        """Return whether an annotation or segment is a crowd, or raise an error if the mark is wrong."""
        try:
            return flag(annotation.get("iscrowd"))
        except ValueError as error:
            message = f"{self.path}: annotation {shown(annotation.get('id'))} of image {self.name(index)} has iscrowd"
            raise DataError("broken iscrowd", f"{message} {shown(annotation['iscrowd'])}: {error}") from error
