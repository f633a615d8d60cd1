"""Average precision of instances, by COCO's own evaluator (pycocotools).

Predictions and target are kept as run lengths until ``compute``. Objects are ordered by the ids of their images, so
the scores do not depend on who evaluated which image. Only countable classes ("things") are evaluated: predictions of
others are left out. Masks lose the pixels that are ignored, and are left out if they have no other pixel; COCO itself
has no such pixels, only crowds.

The area that decides whether an object is small is that of its mask. COCO's json has the area of the polygon, which is
a little different; ``score_files`` uses the json itself and gives the official numbers to the last digit.
"""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..data.masks import area, encode, intersection
from ..data.sample import Sample, Vocabulary
from ..inference.predictions import Instance, by_id
from .evaluator import Evaluator
from .mean_precision import measure_precision

AREAS = (32.0**2, 96.0**2)  # COCO's borders of small, medium and large, in pixels
_STATS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "", "", "AR", "AR_small", "AR_medium", "AR_large")


class InstanceEvaluator(Evaluator):
    """Evaluate instances: AP, AP50, AP75, AP_small, AP_medium, AP_large and the recalls AR*; AP and AP50 of each class.

    Parameters
    ----------
    vocabulary : Vocabulary
    areas : tuple of float
        Mask areas in pixels up to which an object is small, and from which it is large.
    least_score : float, optional
        Measure ``mean_precision`` (:mod:`train.metrics.mean_precision`), too, of objects of at least this score.
    """

    task = "instance"

    def __init__(self, vocabulary: Vocabulary, areas: tuple[float, float] = AREAS, least_score: float | None = None):
        super().__init__(vocabulary)
        if not 0 < areas[0] < areas[1]:
            raise ValueError(f"areas must be two growing numbers of pixels, not {areas}")
        if not vocabulary.things:
            raise ValueError(f"vocabulary {vocabulary.name} has no countable classes: instances cannot be evaluated")
        self.areas, self.least_score = areas, least_score
        self.images: dict[str, dict] = {}

    def compute(self) -> dict:
        """Scores in percent."""
        images, targets, found = [], [], []
        for number, name in enumerate(sorted(self.images, key=by_id), 1):
            image = self.images[name]
            images.append({"id": number, "height": image["size"][0], "width": image["size"][1]})
            targets += [{**each, "image_id": number} for each in image["target"]]
            found += [{**each, "image_id": number} for each in image["found"]]
        classes = self.vocabulary.classes
        categories = [{"id": label, "name": classes[label].name} for label in sorted(self.vocabulary.things)]
        with contextlib.redirect_stdout(io.StringIO()):
            scores = score(_index(images, categories, targets), _index(images, categories, found), self.areas)
        if self.least_score is None:
            return scores
        precisions = [image["precision"] for image in self.images.values()]
        return {"mean_precision": 100 * float(np.mean(precisions)) if precisions else float("nan"), **scores}

    def _add(self, target: Sample, prediction: list[Instance]) -> None:
        looked_at = encode(~target.ignore) if target.ignore.any() else None
        self.images[target.name] = {
            "size": [int(side) for side in target.ignore.shape],
            "target": list(self._targets(target, looked_at)),
            "found": list(self._found(prediction, looked_at)),
        }
        if self.least_score is not None:
            things = self.vocabulary.things
            self.images[target.name]["precision"] = measure_precision(target, prediction, self.least_score, things)

    def _targets(self, target: Sample, looked_at: dict | None):
        """Annotations of the objects that have pixels."""
        for mask, label, crowd in zip(target.masks, target.labels.tolist(), target.crowd.tolist(), strict=True):
            rle = encode(mask) if looked_at is None else intersection(encode(mask), looked_at)
            if label in self.vocabulary.things and area(rle):
                yield {"category_id": label, "segmentation": rle, "area": area(rle), "iscrowd": int(crowd)}

    def _found(self, prediction: list[Instance], looked_at: dict | None):
        """Annotations of the predicted objects; one that has pixels, but none that is looked at, is left out."""
        for each in prediction:
            rle = each.rle if looked_at is None else intersection(each.rle, looked_at)
            if each.label in self.vocabulary.things and (area(rle) or not area(each.rle)):
                yield {
                    "category_id": each.label,
                    "segmentation": rle,
                    "area": area(rle),
                    "iscrowd": 0,
                    "score": each.score,
                }

    def _kept(self) -> dict:
        return self.images

    def _join(self, kept: dict) -> None:
        self.images |= kept


def _index(images: list, categories: list, annotations: list) -> COCO:
    """Create pycocotools' object of annotations; their numbers start at 1, since the evaluator takes 0 for no match."""
    coco = COCO()
    numbered = [{**each, "id": number} for number, each in enumerate(annotations, 1)]
    coco.dataset = {"info": {}, "images": images, "categories": categories, "annotations": numbered}
    coco.createIndex()
    return coco


def score(target: COCO, found: COCO, areas: tuple[float, float] = AREAS) -> dict:
    """Run COCO's evaluator.

    Parameters
    ----------
    target, found : COCO
        Annotations; ``found`` with scores.
    areas : tuple of float
        As of ``InstanceEvaluator``.

    Returns
    -------
    dict
        Scores in percent, as of ``InstanceEvaluator.compute``.
    """
    evaluator = COCOeval(target, found, "segm")
    names = {each["id"]: each["name"] for each in target.dataset["categories"]}
    wanted = sorted({each["category_id"] for each in target.dataset["annotations"]} & names.keys())
    evaluator.params.catIds = wanted or sorted(names)[:1]  # the others have no score, but would take 100 kB each
    most = evaluator.params.areaRng[0][1]
    evaluator.params.areaRng = [[0, most], [0, areas[0]], [areas[0], areas[1]], [areas[1], most]]
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    precision = evaluator.eval["precision"][..., 0, -1]  # (10 overlaps, recalls, classes), all areas, 100 detections
    scores = {name: _percent(value) for name, value in zip(_STATS, evaluator.stats, strict=True) if name}
    return scores | {
        "per_class": {name: {"AP": float("nan"), "AP50": float("nan")} for _, name in sorted(names.items())}
        | {
            names[number]: {"AP": _percent(_mean(precision[..., k])), "AP50": _percent(_mean(precision[0, :, k]))}
            for k, number in enumerate(evaluator.params.catIds)
        }
    }


def score_files(target: Path, found: Path, areas: tuple[float, float] = AREAS) -> dict:
    """Evaluate a results file by COCO's annotation file, as COCO's server does.

    Parameters
    ----------
    target : Path
        ``instances_val2017.json``.
    found : Path
        Results in COCO's format, as ``submission`` writes them.
    areas : tuple of float
        As of ``InstanceEvaluator``.

    Returns
    -------
    dict
        Scores in percent, as of ``InstanceEvaluator.compute``.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(target))
        results = json.loads(Path(found).read_text())
        if not results:  # pycocotools reads no empty list
            return score(coco, _index(coco.dataset["images"], coco.dataset["categories"], []), areas)
        return score(coco, coco.loadRes(results), areas)


def _mean(values: np.ndarray) -> float:
    """Mean of what the evaluator filled in; -1, its sign for nothing, if that is none."""
    return values[values > -1].mean() if (values > -1).any() else -1.0


def _percent(value: float) -> float:
    return float("nan") if value < 0 else 100 * float(value)
