"""COCO's json files: objects (instances_*.json) and panoptic segments (panoptic_*.json with a folder of PNGs)."""

from collections import Counter
from pathlib import Path

import numpy as np

from ..common.errors import one_line
from .category_maps import distinct, split, unknown_ids
from .coco_json import flag, shown, text
from .coco_masks import box_to_mask, to_mask
from .coco_source import CocoSource
from .mask_files import DataError, check_size, read_segment_ids
from .sample import Sample

MOST_BYTES = 1 << 32  # masks of one picture, a byte a pixel


class InstanceSource(CocoSource):
    """Objects with polygons or run lengths.

    Parameters
    ----------
    path, pictures, vocabulary, skip_empty
        As for CocoSource.
    boxes : bool
        Whether the box of an object without an outline is taken for its mask.
    """

    task = "instance"

    def __init__(
        self, path: Path, pictures: Path | None = None, vocabulary=None, skip_empty: bool = False, boxes: bool = False
    ):
        super().__init__(path, pictures, vocabulary, skip_empty)
        self.boxes = boxes
        if boxes and self.outlined < self.annotated:
            count = f"{self.annotated - self.outlined} of {self.annotated} objects have no outline"
            self.notes = [f"{count}: their boxes are taken for masks"]

    @staticmethod
    def holds_object(annotation: dict) -> bool:
        """Whether an annotation is of one object."""
        return not flag(annotation.get("iscrowd"))

    def load(self, index: int, epoch: int = 0) -> Sample:
        """Read a picture and draw its objects, the same in every epoch; masks of no pixel are kept."""
        image, annotations = self.read_picture(index), self.annotations(index)
        labels = np.array([self.label(a, index) for a in annotations], dtype=np.int64)
        crowd = np.array([self.is_crowd(a, index) for a in annotations], dtype=bool)
        if len(annotations) * image[..., 0].size > MOST_BYTES:
            size = f"{len(annotations):,} annotations on {image.shape[1]:,} x {image.shape[0]:,} pixels"
            message = f"{self.path}: image {self.name(index)} has {size}, too many to hold: cut the picture up"
            raise DataError("too many annotations", message)
        masks = np.zeros((len(annotations), *image.shape[:2]), dtype=bool)
        for mask, annotation in zip(masks, annotations, strict=True):
            mask[:] = self.draw(annotation, index)
        return Sample(image, masks, labels, crowd, np.zeros(image.shape[:2], dtype=bool), self.name(index))

    def draw(self, annotation: dict, index: int) -> np.ndarray:
        """Draw one annotation, or name the broken one."""
        image = self.images[index]
        outline, size = annotation.get("segmentation"), (image["height"], image["width"])
        try:
            if self.boxes and not outline:
                return box_to_mask(annotation.get("bbox"), *size)
            return to_mask(outline, *size)
        except (ValueError, TypeError) as error:
            hint = ", or pass --data.boxes true (check_data: --boxes) to take its box" if not outline else ""
            raise DataError(
                "broken polygon or run lengths",
                f"{self.path}: annotation {shown(annotation.get('id'))} of image {image['id']}: {one_line(error)}; "
                f"correct or remove it{hint}",
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

    def __init__(self, path: Path, masks: Path, pictures: Path | None, vocabulary=None, skip_empty: bool = False):
        self.masks = masks
        super().__init__(path, pictures, vocabulary, skip_empty)

    @staticmethod
    def holds_object(annotation: dict) -> bool:
        """Whether any segment is not a crowd."""
        return any(not flag(segment.get("iscrowd")) for segment in list_segments(annotation))

    def load(self, index: int, epoch: int = 0) -> Sample:
        """Read a picture and its segments, the same in every epoch; pixels of segment 0 are ignored."""
        image, annotations = self.read_picture(index), self.annotations(index)
        if len(annotations) != 1:
            message = f"{self.path} has {len(annotations)} annotations of image {self.name(index)}, not one"
            raise DataError("image without its one annotation", f"{message}: add or remove some, or remove the image")
        path = self.mask_path(annotations[0], index)
        ids = read_segment_ids(path)
        check_size(ids.shape, path, image.shape[:2], self.pictures / self.images[index]["file_name"])
        values, counts, places = distinct(ids)
        try:
            listed = list_segments(annotations[0])
        except ValueError as error:
            message = f"{self.path}: the annotation of image {self.name(index)}: {one_line(error)}"
            raise DataError("broken segments", message) from error
        segments = {segment["id"]: self.part(segment, index) for segment in listed}
        pairs = zip(values.tolist(), counts.tolist(), strict=True)
        unknown = {value: count for value, count in pairs if value and value not in segments}
        if unknown:
            raise unknown_ids(path, unknown, self.vocabulary, f"list these segments in {self.path.name}, or erase them")
        undrawn = segments.keys() - set(values.tolist())
        if undrawn:
            message = f"{path} lacks segment {min(undrawn)}, listed in {self.path.name}: draw or unlist it"
            raise DataError("segments listed but not drawn", message)
        parts = [segments.get(value) for value in values.tolist()]
        if len(set(parts)) * ids.size > MOST_BYTES:
            message = f"{path} has {len(set(parts)):,} segments on {ids.size:,} pixels, too many to hold"
            raise DataError("too many annotations", f"{message}: cut the picture up")
        masks, labels, crowd = split(places, parts)
        return Sample(image, masks, labels, crowd, ids == 0, self.name(index))

    def mask_path(self, annotation: dict, index: int) -> Path:
        """Return the PNG file of an annotation, or raise an error if it names none."""
        name = annotation.get("file_name")
        try:
            return self.masks / text(name)
        except ValueError as error:
            message = f"{self.path}: the annotation of image {self.name(index)} has file_name {shown(name)}"
            raise DataError("broken file_name", f"{message}: name its PNG file in {self.masks}") from error

    def part(self, segment: dict, index: int) -> tuple[int, int, bool]:
        """Return which mask a segment belongs to: (label, segment or -1, crowd)."""
        label, crowd = self.label(segment, index), self.is_crowd(segment, index)
        countable = label in self.vocabulary.things
        return label, segment["id"] if countable else -1, countable and crowd


def list_segments(annotation: dict) -> list[dict]:
    """List a panoptic annotation's segments.

    Raises
    ------
    ValueError
        They are no list of objects, each with an id of its own that a PNG can hold.
    """
    segments = annotation.get("segments_info")
    if not isinstance(segments, list) or not all(isinstance(each, dict) for each in segments):
        raise ValueError("segments_info is no list of segments")
    ids = [each.get("id") for each in segments]
    odd = [each for each in ids if isinstance(each, bool) or not isinstance(each, int) or not 0 < each < 1 << 24]
    if odd:
        raise ValueError(f"a segment has id {shown(odd[0])}, not a whole number from 1 to 16777215")
    if len(set(ids)) < len(ids):
        raise ValueError(f"segment {Counter(ids).most_common(1)[0][0]} is listed more than once")
    return segments
