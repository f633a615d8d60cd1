"""Evaluating a data set image by image: what every evaluator has in common.

An evaluator is fed one image after the other and keeps sums, small tables or run lengths, never dense masks. With
several processes, each evaluates its own images; ``gather`` joins what they kept, so that every process computes the
same scores.
"""

from abc import ABC, abstractmethod

from ..common.distributed import Ranks
from ..data.sample import Sample, Vocabulary
from ..inference.predictions import check


class Evaluator(ABC):
    """An evaluator of one task.

    Parameters
    ----------
    vocabulary : Vocabulary

    Attributes
    ----------
    task : str
        "semantic", "instance" or "panoptic".
    names : set of str
        Images evaluated so far.
    """

    task: str

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.names: set[str] = set()

    def update(self, target: Sample, prediction) -> None:
        """Evaluate an image.

        Parameters
        ----------
        target : Sample
        prediction : ndarray, list of Instance, or Panoptic
            This task's prediction for ``target.image``.

        Raises
        ------
        ValueError
            An image evaluated before, or a prediction that does not fit it (see ``train.inference.predictions.check``).
        """
        check(self.task, prediction, target.name, target.ignore.shape, self.vocabulary.num_classes)
        self._note([target.name])
        self._add(target, prediction)

    def gather(self, ranks: Ranks) -> None:
        """Join what all processes have evaluated; each must call this once, after its last image."""
        for rank, state in enumerate(ranks.gather(self.state())):
            if rank != ranks.rank:
                self.absorb(state)

    def state(self) -> dict:
        """What was kept, as plain Python and NumPy objects."""
        return {"names": sorted(self.names), "kept": self._kept()}

    def absorb(self, state: dict) -> None:
        """Add another process's ``state()``; an image that both evaluated is a ValueError."""
        self._note(state["names"])
        self._join(state["kept"])

    def _note(self, names) -> None:
        twice = self.names.intersection(names)
        if twice:
            raise ValueError(
                f"image {min(twice)} was evaluated twice: give each image of a data set its own name, once"
            )
        self.names.update(names)

    @abstractmethod
    def compute(self) -> dict:
        """Scores so far, in percent; NaN where there is nothing to score.

        Returns
        -------
        dict
            Names to floats, and ``per_class``: class names to such dicts.
        """

    @abstractmethod
    def _add(self, target: Sample, prediction) -> None: ...

    @abstractmethod
    def _kept(self): ...

    @abstractmethod
    def _join(self, kept) -> None: ...
