"""COCO's json files: objects (instances_*.json) and panoptic segments (panoptic_*.json with a folder of PNGs)."""

import json
from pathlib import Path

import numpy as np

from ..errors import UserError, one_line
from .coco_masks import to_mask
from .ids import distinct, split, unknown_ids
from .pictures import DataError, check_size, read_picture, read_segment_ids
from .types import ClassInfo, Sample, Vocabulary

KEYS = {
    "images": ("id", "file_name", "height", "width"),
    "categories": ("id", "name"),
}


class CocoSource:
    """What both kinds of file share: pictures, classes, and the annotations of each picture.

    Annotations are kept packed as json text, image by image, so that loader processes share the memory.

    Parameters
    ----------
    path : Path
        The json.
    pictures : Path
        Folder of the pictures.
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
    fields: tuple[str, ...]  # what each annotation must have

    def __init__(self, path: Path, pictures: Path, vocabulary: Vocabulary | None = None, skip_empty: bool = False):
        content = read_json(path, KEYS | {"annotations": self.fields})
        self.path, self.pictures = path, pictures
        self.vocabulary = vocabulary or read_vocabulary(content["categories"], f"coco-{self.task}")
        grouped = {image["id"]: [] for image in content["images"]}
        self.homeless = [a for a in content["annotations"] if a["image_id"] not in grouped]
        for annotation in content["annotations"]:
            grouped.get(annotation["image_id"], []).append(annotation)
        kept = [i for i in content["images"] if not skip_empty or any(map(self.has_object, grouped[i["id"]]))]
        self.images = [{key: image[key] for key in KEYS["images"]} for image in kept]
        packed = [json.dumps(grouped[image["id"]]).encode() for image in kept]
        self.ends = np.cumsum([0] + [len(text) for text in packed])
        self.packed = np.frombuffer(b"".join(packed), dtype=np.uint8)

    def __len__(self):
        return len(self.images)

    def name(self, index: int) -> str:
        """Give a picture's id."""
        return str(self.images[index]["id"])

    def order(self, generator: np.random.Generator) -> np.ndarray:
        """Draw one epoch's order of the pictures, (n,) int64."""
        return generator.permutation(len(self))

    def annotations(self, index: int) -> list[dict]:
        """Unpack a picture's annotations."""
        return json.loads(self.packed[self.ends[index] : self.ends[index + 1]].tobytes())

    def problems(self) -> list[DataError]:
        """List what is wrong with the file as a whole."""
        if not self.homeless:
            return []
        named = ", ".join(sorted({str(a["image_id"]) for a in self.homeless})[:5])
        message = f"{self.path}: {len(self.homeless)} annotations are of images it does not list ({named}): remove them"
        return [DataError("annotations of unlisted images", message)]

    def read_picture(self, index: int) -> np.ndarray:
        """Read a picture, whose size must be what the json says."""
        image = self.images[index]
        path = self.pictures / image["file_name"]
        if not path.is_file():
            message = f"no picture {path}, named in {self.path} (image id {image['id']}): fetch it, or pass --images"
            raise DataError("missing picture", message)
        picture = read_picture(path)
        check_size((image["height"], image["width"]), f"{self.path}: image {image['id']}", picture.shape[:2], path)
        return picture

    def label(self, annotation: dict, index: int) -> int:
        """Give the label of an annotation or segment, or name its unknown category."""
        category = annotation.get("category_id")
        if category in self.vocabulary.label_of:
            return self.vocabulary.label_of[category]
        raise DataError(
            "unknown category",
            f"{self.path}: annotation {annotation.get('id')} of image {self.name(index)} has category_id {category}, "
            f"which is not among its categories: add the category or remove the annotation",
        )


class InstanceSource(CocoSource):
    """Objects with polygons or run lengths; parameters as for CocoSource."""

    task = "instance"
    fields = ("image_id",)

    @staticmethod
    def has_object(annotation: dict) -> bool:
        """Whether an annotation is of one object."""
        return not annotation.get("iscrowd", 0)

    def load(self, index: int, epoch: int = 0) -> Sample:
        """Read a picture and draw its objects, the same in every epoch; masks of no pixel are kept."""
        image, annotations = self.read_picture(index), self.annotations(index)
        labels = np.array([self.label(a, index) for a in annotations], dtype=np.int64)
        masks = np.zeros((len(annotations), *image.shape[:2]), dtype=bool)
        for mask, annotation in zip(masks, annotations, strict=True):
            mask[:] = self.draw(annotation, index)
        crowd = np.array([bool(a.get("iscrowd", 0)) for a in annotations], dtype=bool)
        return Sample(image, masks, labels, crowd, np.zeros(image.shape[:2], dtype=bool), self.name(index))

    def draw(self, annotation: dict, index: int) -> np.ndarray:
        """Draw one annotation, or name the broken one."""
        image = self.images[index]
        try:
            return to_mask(annotation.get("segmentation"), image["height"], image["width"])
        except (ValueError, TypeError) as error:
            raise DataError(
                "broken polygon or run lengths",
                f"{self.path}: annotation {annotation.get('id')} of image {image['id']}: {one_line(error)}; "
                f"correct or remove it",
            ) from error


class PanopticSource(CocoSource):
    """Segments drawn in PNG files as R + 256 G + 65536 B.

    Parameters
    ----------
    path : Path
        The json.
    masks : Path
        Folder of the PNG files.
    pictures, vocabulary, skip_empty
        As for CocoSource.
    """

    task = "panoptic"
    fields = ("image_id", "file_name", "segments_info")

    def __init__(self, path: Path, masks: Path, pictures: Path, vocabulary=None, skip_empty: bool = False):
        self.masks = masks
        super().__init__(path, pictures, vocabulary, skip_empty)

    @staticmethod
    def has_object(annotation: dict) -> bool:
        """Whether any segment is not a crowd."""
        return any(not segment.get("iscrowd", 0) for segment in annotation["segments_info"])

    def load(self, index: int, epoch: int = 0) -> Sample:
        """Read a picture and its segments, the same in every epoch; pixels of segment 0 are ignored."""
        image, annotations = self.read_picture(index), self.annotations(index)
        if not annotations:
            message = f"{self.path} has no annotation of image {self.name(index)}: add it or remove the image"
            raise DataError("image without annotation", message)
        path = self.masks / annotations[0]["file_name"]
        ids = read_segment_ids(path)
        check_size(ids.shape, path, image.shape[:2], self.pictures / self.images[index]["file_name"])
        values, counts, places = distinct(ids)
        segments = {segment["id"]: self.part(segment, index) for segment in annotations[0]["segments_info"]}
        pairs = zip(values.tolist(), counts.tolist(), strict=True)
        unknown = {value: count for value, count in pairs if value and value not in segments}
        if unknown:
            raise unknown_ids(path, unknown, self.vocabulary, f"list these segments in {self.path.name}, or erase them")
        undrawn = segments.keys() - set(values.tolist())
        if undrawn:
            message = f"{path} lacks segment {min(undrawn)}, listed in {self.path.name}: draw or unlist it"
            raise DataError("segments listed but not drawn", message)
        masks, labels, crowd = split(places, [segments.get(value) for value in values.tolist()])
        return Sample(image, masks, labels, crowd, ids == 0, self.name(index))

    def part(self, segment: dict, index: int) -> tuple[int, int, bool]:
        """Say which mask a segment belongs to: (label, segment or -1, crowd)."""
        label = self.label(segment, index)
        countable = label in self.vocabulary.things
        return label, segment["id"] if countable else -1, countable and bool(segment.get("iscrowd", 0))


def read_json(path: Path, needed: dict[str, tuple[str, ...]]) -> dict:
    """Read a COCO file and see that its lists are there and their entries have the fields needed."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"no file {path}: unpack COCO's annotations there") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not readable as json: {one_line(error)}") from error
    for key, fields in needed.items():
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise UserError(f"{path} has no list {key!r}: expected a COCO file with {', '.join(needed)}")
        for place, entry in enumerate(entries):
            lacking = [field for field in fields if not isinstance(entry, dict) or field not in entry]
            if lacking:
                raise UserError(f"{path}: entry {place} of {key!r} lacks {lacking[0]!r}: complete or remove it")
    return content


def read_vocabulary(categories: list[dict], name: str) -> Vocabulary:
    """Make the classes of a file's categories, in the order of their ids; countable unless it says otherwise."""
    classes = []
    for each in sorted(categories, key=lambda category: category["id"]):
        color = tuple(each["color"]) if "color" in each else None
        classes.append(ClassInfo(each["name"], each["id"], bool(each.get("isthing", 1)), color))
    return Vocabulary(tuple(classes), name)
