"""Which evaluators a data set has, and several of them beside each other."""

from ..common.distributed import Ranks
from ..data.sample import Sample, Vocabulary
from .cityscapes import CityscapesInstanceEvaluator, CityscapesPanopticEvaluator
from .coco import AREAS, InstanceEvaluator
from .evaluator import Evaluator
from .panoptic import PanopticEvaluator
from .semantic import SemanticEvaluator


class Evaluators:
    """Several evaluators of one model, one a task.

    Parameters
    ----------
    evaluators : list of Evaluator
    """

    def __init__(self, evaluators: list[Evaluator]):
        self.evaluators = {evaluator.task: evaluator for evaluator in evaluators}

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks whose predictions ``update`` needs."""
        return tuple(self.evaluators)

    def update(self, target: Sample, predictions: dict) -> None:
        """Evaluate an image by its predictions, one a task."""
        for task, evaluator in self.evaluators.items():
            evaluator.update(target, predictions[task])

    def gather(self, ranks: Ranks) -> None:
        """Join what all processes have evaluated."""
        for evaluator in self.evaluators.values():
            evaluator.gather(ranks)

    def compute(self) -> dict:
        """Scores of all evaluators in one dict, as ``Evaluator.compute``."""
        scores, per_class = {}, {}
        for evaluator in self.evaluators.values():
            found = evaluator.compute()
            for name, values in found.pop("per_class").items():
                per_class.setdefault(name, {}).update(values)
            scores.update(found)
        return scores | {"per_class": per_class}


def create_evaluators(
    vocabulary: Vocabulary, tasks, areas: tuple[float, float] | None = None, least_score: float | None = None
) -> Evaluators:
    """Choose the official evaluators of a data set: Cityscapes' own for Cityscapes, COCO's for all others.

    Parameters
    ----------
    vocabulary : Vocabulary
    tasks : iterable of str
        Of "semantic" (mIoU), "instance" (AP) and "panoptic" (PQ).
    areas : tuple of float, optional
        Mask areas in pixels up to which an object is small and from which it is large; default COCO's 32^2 and 96^2.
        Cityscapes' evaluator has no such classes.
    least_score : float, optional
        As of ``InstanceEvaluator``; Cityscapes' evaluator has no such measure.

    Returns
    -------
    Evaluators
    """
    makers = {
        "semantic": SemanticEvaluator,
        "instance": lambda vocabulary: InstanceEvaluator(vocabulary, areas or AREAS, least_score),
        "panoptic": PanopticEvaluator,
    }
    if vocabulary.name == "cityscapes":
        makers |= {"instance": CityscapesInstanceEvaluator, "panoptic": CityscapesPanopticEvaluator}
    unknown = sorted(set(tasks) - set(makers))
    if unknown:
        raise ValueError(f"unknown task {unknown[0]!r}: choose from {', '.join(makers)}")
    return Evaluators([makers[task](vocabulary) for task in tasks])
