"""Instance AP and panoptic quality of Cityscapes, by its own evaluator (cityscapesscripts).

Theirs reads files. For instances, the overlaps of predicted and true masks, which are whole numbers of pixels, are
counted here in run lengths, and its own functions do the matching and the averaging; for panoptic results, each image
passes through two small files. So nothing grows with the data set but a few numbers per object.
"""

import contextlib
import copy
import io
import tempfile
import warnings
from pathlib import Path

import numpy as np
from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as instance_evaluation
from cityscapesscripts.evaluation import evalPanopticSemanticLabeling as panoptic_evaluation
from PIL import Image

from ..data.masks import area, encode, intersection
from ..data.sample import Sample, Vocabulary
from ..inference.predictions import Instance, Panoptic
from .evaluator import Evaluator
from .panoptic import PanopticEvaluator
from .targets import segment_map

_GROUP = 1000  # from this number on, an id stands for one object: class id x 1000 + its number in the image


class CityscapesInstanceEvaluator(Evaluator):
    """Evaluate instances: AP (mean over overlaps 0.5 to 0.95) and AP50; both of each class.

    Crowds are Cityscapes' groups ("cargroup"), pixels to be ignored its void classes.

    Parameters
    ----------
    vocabulary : Vocabulary
        Classes with Cityscapes' names.

    Raises
    ------
    ValueError
        A countable class that Cityscapes does not evaluator.
    """

    task = "instance"

    def __init__(self, vocabulary: Vocabulary):
        super().__init__(vocabulary)
        self.settings = copy.copy(instance_evaluation.args)
        instance_evaluation.setInstanceLabels(self.settings)
        unknown = sorted(
            {vocabulary.classes[label].name for label in vocabulary.things} - set(self.settings.instLabels)
        )
        if unknown:
            raise ValueError(f"class {unknown[0]!r} is none of Cityscapes' {', '.join(self.settings.instLabels)}")
        self.images: dict[str, dict] = {}

    def compute(self) -> dict:
        """Scores in percent."""
        if not self.images:
            return {"AP": float("nan"), "AP50": float("nan"), "per_class": {}}
        images = {name: self.images[name] for name in sorted(self.images)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # means over no class at all
            found = instance_evaluation.computeAverages(
                instance_evaluation.evaluateMatches(images, self.settings), self.settings
            )
        classes = found["classes"]
        return {
            "AP": 100 * float(found["allAp"]),
            "AP50": 100 * float(found["allAp50%"]),
            "per_class": {
                name: {"AP": 100 * float(each["ap"]), "AP50": 100 * float(each["ap50%"])}
                for name, each in classes.items()
            },
        }

    def _add(self, target: Sample, prediction: list[Instance]) -> None:
        masks = list(self._true_masks(target))
        matches = {kind: {name: [] for name in self.settings.instLabels} for kind in ("groundTruth", "prediction")}
        for label, entry, _ in masks:
            matches["groundTruth"][self._name(label)].append(entry)
        void = encode(target.ignore)
        for number, each in enumerate(prediction):
            if each.label in self.vocabulary.things and area(each.rle):
                matches["prediction"][self._name(each.label)].append(match(number, each, masks, void))
        self.images[target.name] = matches

    def _name(self, label: int) -> str:
        return self.vocabulary.classes[label].name

    def _true_masks(self, target: Sample):
        """Yield label, the evaluator's entry and run lengths of each object, and of each class's groups together."""
        for label in sorted(self.vocabulary.things):
            number = self.vocabulary.classes[label].id
            mine = target.labels == label
            groups = [target.masks[mine & target.crowd].any(0)] if (mine & target.crowd).any() else []
            named = [(number, mask) for mask in groups]
            named += [(_GROUP * number + k, mask) for k, mask in enumerate(target.masks[mine & ~target.crowd])]
            for identity, mask in named:
                entry = {"instID": identity, "labelID": number, "pixelCount": int((mask & ~target.ignore).sum())}
                if entry["pixelCount"]:
                    yield (
                        label,
                        {**entry, "medDist": -1, "distConf": 0.0, "matchedPred": []},
                        encode(mask & ~target.ignore),
                    )

    def _kept(self) -> dict:
        return self.images

    def _join(self, kept: dict) -> None:
        self.images |= kept


def match(number: int, instance: Instance, masks: list, void: dict) -> dict:
    """Write what the evaluator wants to know of a prediction, and tell the true objects that it overlaps.

    Parameters
    ----------
    number : int
        Of the prediction in its image.
    instance : Instance
    masks : list of (label, entry, run lengths)
        True objects; the prediction is appended to ``entry["matchedPred"]`` of those of its class.
    void : dict
        Pixels to be ignored, in run lengths.

    Returns
    -------
    dict
    """
    entry = {
        "predID": number,
        "pixelCount": area(instance.rle),
        "confidence": instance.score,
        "voidIntersection": area(intersection(instance.rle, void)),
    }
    overlapped = []
    for label, true, rle in masks:
        shared = area(intersection(instance.rle, rle)) if label == instance.label else 0
        if shared:
            plain = {key: value for key, value in true.items() if key != "matchedPred"}
            overlapped.append({**plain, "intersection": shared})
            true["matchedPred"].append({**entry, "intersection": shared})
    return {**entry, "matchedGt": overlapped}


class CityscapesPanopticEvaluator(PanopticEvaluator):
    """Evaluate panoptic results by Cityscapes' own count of matches; scores as ``PanopticEvaluator``.

    Parameters
    ----------
    vocabulary : Vocabulary
    """

    def _add(self, target: Sample, prediction: Panoptic) -> None:
        categories = {each.id: {"isthing": int(each.is_thing)} for each in self.vocabulary.classes}
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            pair = (
                self._write(Path(folder, "true.png"), segment_map(target), self._true_segments(target)),
                self._write(Path(folder, "found.png"), prediction.map, self._segments(prediction)),
            )
            found = panoptic_evaluation.pq_compute_single_core(0, [pair], folder, folder, categories)
        for label, each in enumerate(self.vocabulary.classes):
            stat = found[each.id]
            self.counts[label] += (stat.iou, stat.tp, stat.fp, stat.fn)

    def _true_segments(self, target: Sample):
        for number, (mask, label, crowd) in enumerate(zip(target.masks, target.labels, target.crowd, strict=True), 1):
            pixels = int((mask & ~target.ignore).sum())
            if pixels:
                number_of = self.vocabulary.classes[label].id
                yield {"id": number, "category_id": number_of, "area": pixels, "iscrowd": int(crowd)}

    def _segments(self, prediction: Panoptic):
        for segment in prediction.segments:
            yield {"id": segment.id, "category_id": self.vocabulary.classes[segment.label].id}

    @staticmethod
    def _write(path: Path, ids: np.ndarray, segments) -> dict:
        """Write ids as the colours of a picture, and give the evaluator's description of it."""
        Image.fromarray(id_colours(ids)).save(path, compress_level=1)
        return {"image_id": path.stem, "file_name": path.name, "segments_info": list(segments)}


def id_colours(ids: np.ndarray) -> np.ndarray:
    """Write ids (H, W) as colours uint8 (H, W, 3): id = red + 256 green + 65536 blue, as COCO does."""
    ids = ids.astype(np.uint32)
    return np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], -1).astype(np.uint8)
