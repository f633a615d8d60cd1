"""How long a run is and which batches make it: counted in epochs (passes over the images), or in steps."""

from abc import ABC, abstractmethod

from ..common.distributed import Ranks
from ..config import segmentation
from ..config.section import Section
from ..data.classification_dataset import ImageDataset
from ..data.sampler import EpochSampler, PassSampler, steps_per_epoch


class Progress(ABC):
    """The length of a run.

    Parameters
    ----------
    config : Section
        Of a classifier or a segmenter.
    samples : ImageDataset
        Training images.

    Attributes
    ----------
    epoch_steps : int
        Steps of an epoch, at whose end evaluations are.
    total : int
        Steps of the whole run.
    epochs_between : int
        Epochs from one evaluation to the next.
    needs : tuple of str
        Fields that a checkpoint must have to say where a run was.
    """

    epoch_steps: int
    total: int
    epochs_between: int
    needs: tuple[str, ...] = ()

    def __init__(self, config: Section, samples: ImageDataset):
        self.config, self.samples = config, samples

    def done(self, epoch: int, step: int) -> int:
        """Count the steps done since the run began, after ``epoch`` epochs and ``step`` steps of the next."""
        return min(self.total, epoch * self.epoch_steps) + step

    @abstractmethod
    def sampler(self, ranks: Ranks, epoch: int, step: int):
        """Return this rank's batches that are left of an epoch, lists of (epoch or pass, index)."""

    @abstractmethod
    def describe(self) -> str:
        """Return the run's length in words."""

    @abstractmethod
    def place(self, epoch: int, step: int) -> tuple[str, int]:
        """Return where a run is, as "epoch 1, step 5", and of how many steps that is."""

    def checkpoint_fields(self, epoch: int, step: int) -> dict:
        """Return what a checkpoint says of the place besides epoch and step."""
        return {}

    def restore(self, state: dict) -> tuple[int, int]:
        """Return a checkpoint's epoch and step."""
        return state["epoch"], state["step"]


class EpochProgress(Progress):
    """A run of so many passes over the training images."""

    def __init__(self, config: Section, samples: ImageDataset):
        super().__init__(config, samples)
        self.epoch_steps = steps_per_epoch(samples, config)
        self.total = config.schedule.epochs * self.epoch_steps
        self.epochs_between = config.run.eval_every

    def sampler(self, ranks: Ranks, epoch: int, step: int) -> EpochSampler:
        """Return the batches left of a pass."""
        return EpochSampler(self.samples, self.config, ranks, epoch, step)

    def describe(self) -> str:
        """Return the number of epochs and of the steps of each."""
        return f"{self.config.schedule.epochs} epochs of {self.epoch_steps} steps"

    def place(self, epoch: int, step: int) -> tuple[str, int]:
        """Count within the epoch."""
        return f"epoch {epoch + 1}, step {step}", self.epoch_steps


class StepProgress(Progress):
    """A run of so many steps; an epoch is what lies between two evaluations, wherever passes end."""

    needs = ("done",)

    def __init__(self, config: Section, samples: ImageDataset):
        super().__init__(config, samples)
        self.total = config.schedule.max_steps
        self.epoch_steps, self.epochs_between = min(config.run.eval_every, self.total), 1

    def sampler(self, ranks: Ranks, epoch: int, step: int) -> PassSampler:
        """Return the batches left until the next evaluation."""
        end = min(self.total, (epoch + 1) * self.epoch_steps)
        return PassSampler(self.samples, self.config, ranks, self.done(epoch, step), end)

    def describe(self) -> str:
        """Return the number of steps and of passes."""
        passes = self.total * self.config.run.total_batch / len(self.samples)
        return f"{self.total:,} steps ({passes:.1f} passes)"

    def place(self, epoch: int, step: int) -> tuple[str, int]:
        """Count from the run's beginning."""
        return f"step {self.done(epoch, step)}", self.total

    def checkpoint_fields(self, epoch: int, step: int) -> dict:
        """Return the steps done."""
        return {"done": self.done(epoch, step)}

    def restore(self, state: dict) -> tuple[int, int]:
        """Go on at the same step, also if evaluations come at other ones now."""
        return divmod(state["done"], self.epoch_steps)


def build_progress(config: Section, samples: ImageDataset) -> Progress:
    """Create what counts a run, in epochs or in steps, as its schedule is counted."""
    kind = StepProgress if isinstance(config.schedule, segmentation.Schedule) else EpochProgress
    return kind(config, samples)
