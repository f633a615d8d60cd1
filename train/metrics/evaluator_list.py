"""Which judges a data set has, and several of them beside each other."""

from ..common.distributed import Ranks
from ..data.sample import Sample, Vocabulary
from .cityscapes import CityscapesInstanceEvaluator, CityscapesPanopticEvaluator
from .coco import AREAS, InstanceEvaluator
from .evaluator import Evaluator
from .panoptic import PanopticEvaluator
from .semantic import SemanticEvaluator


class Judges:
    """Several judges of one model, one a task.

    Parameters
    ----------
    judges : list of Evaluator
    """

    def __init__(self, judges: list[Evaluator]):
        self.judges = {judge.task: judge for judge in judges}

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks whose predictions ``update`` needs."""
        return tuple(self.judges)

    def update(self, truth: Sample, predictions: dict) -> None:
        """Judge an image by its predictions, one a task."""
        for task, judge in self.judges.items():
            judge.update(truth, predictions[task])

    def gather(self, ranks: Ranks) -> None:
        """Join what all processes have judged."""
        for judge in self.judges.values():
            judge.gather(ranks)

    def compute(self) -> dict:
        """Scores of all judges in one dict, as ``Evaluator.compute``."""
        scores, per_class = {}, {}
        for judge in self.judges.values():
            found = judge.compute()
            for name, values in found.pop("per_class").items():
                per_class.setdefault(name, {}).update(values)
            scores.update(found)
        return scores | {"per_class": per_class}


def create_judges(vocabulary: Vocabulary, tasks, areas: tuple[float, float] | None = None) -> Judges:
    """Choose the official judges of a data set: Cityscapes' own for Cityscapes, COCO's for all others.

    Parameters
    ----------
    vocabulary : Vocabulary
    tasks : iterable of str
        Of "semantic" (mIoU), "instance" (AP) and "panoptic" (PQ).
    areas : tuple of float, optional
        Mask areas in pixels up to which an object is small and from which it is large; default COCO's 32^2 and 96^2.
        Cityscapes' judge has no such classes.

    Returns
    -------
    Judges
    """
    makers = {
        "semantic": SemanticEvaluator,
        "instance": lambda vocabulary: InstanceEvaluator(vocabulary, areas or AREAS),
        "panoptic": PanopticEvaluator,
    }
    if vocabulary.name == "cityscapes":
        makers |= {"instance": CityscapesInstanceEvaluator, "panoptic": CityscapesPanopticEvaluator}
    unknown = sorted(set(tasks) - set(makers))
    if unknown:
        raise ValueError(f"unknown task {unknown[0]!r}: choose from {', '.join(makers)}")
    return Judges([makers[task](vocabulary) for task in tasks])
