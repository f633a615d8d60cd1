"""Mean intersection over union by a confusion matrix, as the evaluators of ADE20K and Cityscapes compute it.

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
    confusion : ndarray of int64, shape (C, C)
        Pixels by true label (row) and predicted label (column).
    """

    task = "semantic"

    def __init__(self, vocabulary: Vocabulary):
        super().__init__(vocabulary)
        self.confusion = np.zeros((vocabulary.num_classes,) * 2, dtype=np.int64)

    def compute(self) -> dict:
        """Scores in percent."""
        true, predicted, right = self.confusion.sum(1), self.confusion.sum(0), self.confusion.diagonal()
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
        pairs = true[counted] * classes + prediction[counted]
        self.confusion += np.bincount(pairs, minlength=classes**2).reshape(classes, classes)

    def _kept(self) -> np.ndarray:
        return self.confusion

    def _join(self, kept: np.ndarray) -> None:
        self.confusion += kept


def mean(values: np.ndarray) -> float:
    """Mean of the values that are numbers; NaN if none is."""
    numbers = values[~np.isnan(values)]
    return float(numbers.mean()) if numbers.size else float("nan")
