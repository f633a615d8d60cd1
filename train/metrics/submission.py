"""Results in the formats that the official evaluators and servers read.

===========  ==================================================================================================
task         files in the folder
===========  ==================================================================================================
semantic     ``NAME.png``, 8 bits: the data set's own ids (ADE20K 1 to 150; Cityscapes' labelIds)
instance     COCO: ``detections_SPLIT_results.json``; Cityscapes: ``NAME.txt`` and ``masks/NAME_NUMBER.png``
panoptic     COCO: ``panoptic_SPLIT_results.json`` and a folder of that name with ``NAME.png``;
             Cityscapes: ``cityscapes_panoptic_SPLIT.json`` and such a folder
===========  ==================================================================================================

By hand, as no library writes them: the official tools only read. Pictures are written image by image; what goes into a
json is kept, as run lengths, until ``close``.
"""

import io
import json
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
from PIL import Image

from ..common.distributed import Ranks
from ..common.errors import writing
from ..common.output_files import Outputs
from ..data.masks import decode
from ..data.sample import Vocabulary
from ..inference.predictions import Instance, Panoptic, by_id, image_id
from .cityscapes import id_colours


class Writer(ABC):
    """A task's results on the way to disk.

    Parameters
    ----------
    folder : Path
        Made if it is not there; no file in it is written over that is not as we wrote it.
    vocabulary : Vocabulary
    split : str
        "val" or "test", for the names of files.
    """

    def __init__(self, folder: Path, vocabulary: Vocabulary, split: str = "val"):
        self.folder, self.vocabulary, self.split = Path(folder), vocabulary, split
        self.outputs = Outputs(self.folder)
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def save(self, name: str, picture: np.ndarray) -> None:
        """Write a picture as PNG."""
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        self.outputs.write(name, buffer.getvalue())

    @abstractmethod
    def add(self, name: str, prediction) -> None:
        """Write, or keep, an image's prediction."""

    @abstractmethod
    def close(self, ranks: Ranks | None = None) -> None:
        """Finish; with several processes each must call this, and the first writes what all have kept."""

    def id_of(self, label: int) -> int:
        """Number of a class in the data set's own files."""
        return self.vocabulary.classes[label].id


class PictureWriter(Writer):
    """What the formats without a json share: there is nothing left to write at the end."""

    def close(self, ranks: Ranks | None = None) -> None:
        """Do nothing."""


class SemanticWriter(PictureWriter):
    """Label maps as pictures of the data set's ids."""

    def __init__(self, folder: Path, vocabulary: Vocabulary, split: str = "val"):
        super().__init__(folder, vocabulary, split)
        ids = [each.id for each in vocabulary.classes]
        if min(ids) < 0 or max(ids) > 255:
            raise ValueError(f"class ids {min(ids)} to {max(ids)} do not fit into 8-bit pictures: use ids of 0 to 255")
        self.ids = np.array(ids, dtype=np.uint8)

    def add(self, name: str, prediction: np.ndarray) -> None:
        """Write an image's labels."""
        self.save(f"{stem(name)}.png", self.ids[prediction])


class CityscapesInstanceWriter(PictureWriter):
    """A text file per image, with a line and a mask's picture per object."""

    def add(self, name: str, prediction: list[Instance]) -> None:
        """Write an image's objects; without any, an empty text file."""
        lines = []
        for number, each in enumerate(prediction):
            mask = f"masks/{stem(name)}_{number:03d}.png"
            self.save(mask, np.where(decode(each.rle), np.uint8(255), np.uint8(0)))
            lines.append(f"{mask} {self.id_of(each.label)} {each.score:.9g}\n")
        self.outputs.write(f"{stem(name)}.txt", "".join(lines).encode())


class JsonWriter(Writer):
    """What COCO's two formats share: entries kept image by image, written in the order of their ids."""

    def __init__(self, folder: Path, vocabulary: Vocabulary, split: str = "val"):
        super().__init__(folder, vocabulary, split)
        self.images: dict[str, list | dict] = {}
        self.outputs.check([self.path.name])

    @property
    @abstractmethod
    def path(self) -> Path:
        """The json file."""

    @abstractmethod
    def content(self, images: list):
        """What the json file holds."""

    def close(self, ranks: Ranks | None = None) -> None:
        """Write the json file."""
        images = {}
        for part in ranks.gather(self.images) if ranks else [self.images]:
            images |= part
        if ranks is None or ranks.first:
            content = self.content([images[name] for name in sorted(images, key=by_id)])
            self.outputs.write(self.path.name, json.dumps(content).encode())


class CocoInstanceWriter(JsonWriter):
    """One json list of all objects, masks as run lengths."""

    @property
    def path(self) -> Path:
        """The json file."""
        return self.folder / f"detections_{self.split}_results.json"

    def add(self, name: str, prediction: list[Instance]) -> None:
        """Keep an image's objects."""
        self.images[name] = [
            {
                "image_id": image_id(name),
                "category_id": self.id_of(each.label),
                "segmentation": {"size": list(each.rle["size"]), "counts": _text(each.rle["counts"])},
                "score": float(each.score),
            }
            for each in prediction
        ]

    def content(self, images: list) -> list:
        """All objects."""
        return [each for image in images for each in image]


class PanopticWriter(JsonWriter):
    """A picture of segment ids per image, and a json that names the classes of the segments."""

    @property
    def path(self) -> Path:
        """The json file; the pictures are in the folder of its name."""
        cityscapes = self.vocabulary.name == "cityscapes"
        return self.folder / (
            f"cityscapes_panoptic_{self.split}.json" if cityscapes else f"panoptic_{self.split}_results.json"
        )

    def add(self, name: str, prediction: Panoptic) -> None:
        """Write an image's map and keep its segments."""
        file = f"{stem(name)}.png"
        self.save(f"{self.path.stem}/{file}", id_colours(prediction.map))
        self.images[name] = {
            "image_id": image_id(name),
            "file_name": file,
            "segments_info": [
                {"id": int(each.id), "category_id": self.id_of(each.label)} for each in prediction.segments
            ],
        }

    def content(self, images: list) -> dict:
        """Annotations of all images."""
        return {"annotations": images}


def create_writer(task: str, folder: Path, vocabulary: Vocabulary, split: str = "val") -> Writer:
    """Choose the format of a task and data set.

    Parameters
    ----------
    task : str
        "semantic", "instance" or "panoptic".
    folder : Path
        Where to write.
    vocabulary : Vocabulary
        Cityscapes has its own formats; all others get COCO's, or pictures of ids.
    split : str
        For the names of files.

    Returns
    -------
    Writer
    """
    instance = CityscapesInstanceWriter if vocabulary.name == "cityscapes" else CocoInstanceWriter
    writers = {"semantic": SemanticWriter, "instance": instance, "panoptic": PanopticWriter}
    if task not in writers:
        raise ValueError(f"unknown task {task!r}: choose from {', '.join(writers)}")
    return writers[task](folder, vocabulary, split)


def stem(name: str) -> str:
    """Name an image's files; COCO's numbers have 12 digits."""
    identity = image_id(name)
    return f"{identity:012d}" if isinstance(identity, int) else identity


def _text(counts: bytes | str) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts
