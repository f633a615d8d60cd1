"""Mean intersection over union by pixel counts, as the evaluators of ADE20K and Cityscapes compute it.

Pixels without a true label, or to be ignored, are not counted at all. A class that is neither in the target nor
predicted on a counted pixel takes no part in the mean.
"""

import numpy as np

from ..data.sample import Sample, Vocabulary
from .evaluator import Evaluator
from .targets import NOTHING, label_map


class SemanticEvaluator(Evaluator):
    """Evaluate label maps: mIoU, mean_accuracy (of the classes in the target), pixel_accuracy; IoU of each class.

    Parameters
    ----------
    vocabulary : Vocabulary

    Attributes
    ----------
    pixels : ndarray of int64, shape (3, C)
        Of each class: truly its own, predicted as it, and both.
    """

    task = "semantic"

    def __init__(self, vocabulary: Vocabulary):
        super().__init__(vocabulary)
        self.pixels = np.zeros((3, vocabulary.num_classes), dtype=np.int64)

    def compute(self) -> dict:
        """Scores in percent."""
        true, predicted, right = self.pixels
        with np.errstate(invalid="ignore"):
            iou, accuracy = 100 * right / (true + predicted - right), 100 * right / true  # 0 / 0 is NaN: left out
        return {
            "mIoU": mean(iou),
            "mean_accuracy": mean(accuracy),
            "pixel_accuracy": 100.0 * right.sum() / true.sum() if true.any() else float("nan"),
            "per_class": {
                each.name: {"IoU": float(value)} for each, value in zip(self.vocabulary.classes, iou, strict=True)
            },
        }

    def _add(self, target: Sample, prediction: np.ndarray) -> None:
        true, classes = label_map(target), self.vocabulary.num_classes
        counted = true != NOTHING
        true, predicted = true[counted], prediction[counted]
        parts = true, predicted, true[true == predicted]
        self.pixels += np.stack([np.bincount(part, minlength=classes) for part in parts])

    def _kept(self) -> np.ndarray:
        return self.pixels

    def _join(self, kept: np.ndarray) -> None:
        self.pixels += kept


def mean(values: np.ndarray) -> float:
    """Mean of the values that are numbers; NaN if none is."""
    numbers = values[~np.isnan(values)]
    return float(numbers.mean()) if numbers.size else float("nan")
