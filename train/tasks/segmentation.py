"""Segmentation as a task of the common machinery (:mod:`train.tasks.task`).

Epochs are what lies between two evaluations: ``run.eval_every`` updates. Pictures come in passes, pass p's order being
a function of (seed, p); update t of the run takes the pictures t T ... (t + 1) T - 1 of all passes one after the other,
T being the total batch. The points at which masks are compared depend on (seed, update, picture), and sums are divided
by what the whole update holds, so neither the number of processes nor that of pieces changes a result.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from fast import SegmenterOutput
from fast.matching import NO_OBJECT_WEIGHT, Objects, SetLoss

from ..common.distributed import Ranks
from ..common.errors import UserError
from ..config.segmentation import Config
from ..data.loader import BadImages, load
from ..data.sample import Vocabulary
from ..data.sampler import EvalKeys, PassKeys
from ..data.segmentation import check_pictures, open_sets, pack_vocabulary
from ..data.segmentation_dataset import Batch, EvalSamples, SegmentationSamples
from ..engine.run import Run
from ..inference.views import predict, prepare_views
from ..metrics.evaluator_list import create_judges
from ..models.autocast import autocast
from ..models.checkpoint import SEGMENTER
from ..models.segmenter import build_model, build_optimizer, build_scheduler, peak_rate
from ..models.weights import other_classes
from .task import Task

SCORES = {"panoptic": "PQ", "instance": "AP", "semantic": "mIoU"}


@dataclass
class Shared(Batch):
    """A piece of an update that knows what the mean piece of the update holds.

    Attributes
    ----------
    found : float
        Objects.
    weight : float
        Weight of all queries in the class loss: 1 for a matched one, less for others.
    update : int
        Number of the update.
    """

    found: float
    weight: float
    update: int


class Segmentation(Task):
    """Pictures with masks.

    Parameters
    ----------
    config : Config
    """

    kind, command, needs = SEGMENTER, "train.segment", ("done", "vocabulary", "task")

    def __init__(self, config: Config):
        self.criterion = SetLoss(config.loss.points)

    def open_sets(self, config: Config) -> tuple[SegmentationSamples, EvalSamples]:
        """Open the pictures; the config's number of classes is taken from them if it is open."""
        sets = open_sets(config)
        for samples in sets:
            check_pictures(samples.source, samples.on_bad_image)
        return sets

    def build_model(self, config: Config, train_set: SegmentationSamples) -> nn.Module:
        """Make the config's segmenter."""
        return build_model(config, class_names(train_set))

    def build_optimizer(self, model: nn.Module, config: Config) -> torch.optim.Optimizer:
        """Make AdamW with the backbone's own rate."""
        return build_optimizer(model, config)

    def peak_rate(self, config: Config) -> tuple[float, str]:
        """Give the peak learning rate for the config's batch."""
        return peak_rate(config)

    def build_scheduler(self, optimizer: torch.optim.Optimizer, config: Config, updates: int):
        """Make the poly or step schedule."""
        return build_scheduler(optimizer, config)

    def epoch_length(self, config: Config, train_set: SegmentationSamples) -> int:
        """Count the updates between evaluations."""
        return min(config.run.eval_every, config.schedule.updates)

    def total_updates(self, config: Config, updates: int) -> int:
        """Give the schedule's updates."""
        return config.schedule.updates

    def keys(self, run: Run) -> PassKeys:
        """Give the keys of the batches left until the next evaluation."""
        end = min(run.total, (run.epoch + 1) * run.updates)
        return PassKeys(run.train_set, run.config, run.ranks, run.done, end)

    def describe_plan(self, run: Run) -> list[str]:
        """Say how many pictures, classes and updates there are."""
        source, passes = run.train_set.source, run.total * run.config.run.total_batch / len(run.train_set)
        counts = f"{len(run.train_set):,} training and {len(run.val_set):,} validation pictures"
        classes = f"{source.vocabulary.num_classes} classes ({len(source.vocabulary.things)} countable)"
        sources = (source, run.val_set.source)
        notes = dict.fromkeys(f"note: {note}" for each in sources for note in getattr(each, "notes", ()))
        return [
            f"{counts} for {source.task} segmentation, {classes}; {run.total:,} updates ({passes:.1f} passes)",
            *notes,
        ]

    def place(self, run: Run) -> tuple[str, int]:
        """Count updates of the whole run."""
        return f"update {run.done}", run.total

    def restore_place(self, run: Run, state: dict) -> tuple[int, int]:
        """Go on at the same update, also if evaluations come at other ones now."""
        return divmod(state["done"], run.updates)

    def facts(self, run: Run) -> dict:
        """Keep what a prediction needs to know of the data."""
        source = run.val_set.source
        return {"done": run.done, "task": source.task, "vocabulary": pack_vocabulary(source.vocabulary)}

    def check_classes(self, run: Run, state: dict, path: Path) -> None:
        """Refuse other names, or the same in another order."""
        known, wanted = [each["name"] for each in state["vocabulary"]["classes"]], class_names(run.train_set)
        if known != wanted:
            raise other_classes(path, known, wanted, "go on with the same data, or start anew from --model.init")

    def share(self, run: Run, pieces: list[Batch]) -> list[Shared]:
        """Count the update's objects and queries over all ranks; an update without any object counts as one."""
        queries = run.model.config.num_queries
        counts = [len(each.labels) for batch in pieces for each in batch.objects]
        weight = sum(class_weight(count, queries) for count in counts)
        parts = len(pieces) * run.ranks.size
        found, weight = (value / parts for value in run.ranks.sums([sum(counts), weight]))
        found = max(found, 1 / parts)
        return [
            Shared(batch.images, batch.objects, batch.asked, batch.used, found, weight, run.done) for batch in pieces
        ]

    def targets(self, run: Run, batch: Shared) -> tuple[torch.Tensor, Shared]:
        """Move images and masks to the device."""
        device = run.ranks.device
        images = batch.images.to(device, non_blocking=True)
        moved = [
            Objects(each.labels.to(device, non_blocking=True), each.masks.to(device, non_blocking=True))
            for each in batch.objects
        ]
        return images, replace(batch, objects=moved)

    def loss(self, run: Run, output: SegmenterOutput, targets: Shared) -> torch.Tensor:
        """Sum the pictures' losses, in float32."""
        keys = (zlib.crc32(repr((run.config.run.seed, targets.update, index)).encode()) for index in targets.asked)
        generators = [torch.Generator(run.ranks.device).manual_seed(key) for key in keys]
        return self.criterion(output, targets.objects, targets.found, generators, targets.weight)["loss"]

    def evaluate(self, run: Run, model: nn.Module, say: Callable[[str], None], stop: Callable[[], bool]) -> dict:
        """Judge by the official judges."""
        return evaluate(model, run.val_set, run.config, run.ranks, say, stop)

    def score(self, values: dict) -> float:
        """Choose the main score, in percent."""
        return values.get("score") or 0.0

    def describe_scores(self, values: dict, best: float) -> str:
        """Name the main scores in percent."""
        names = ("PQ", "AP", "AP_small", "mIoU")
        shown = ", ".join(
            f"{prefix}{name} {values[prefix + name]:.2f}"
            for prefix in ("", "ema_")
            for name in names
            if values.get(prefix + name) is not None
        )
        nothing = "nothing to score" if values else "no validation picture could be judged"
        return f"{shown or nothing}; best {best:.2f} %"


def class_names(samples) -> list[str]:
    """Give the names of the classes in the order of their labels."""
    return [each.name for each in samples.source.vocabulary.classes]


def class_weight(objects: int, queries: int) -> float:
    """Add up the weights of one picture's queries in the class loss: 1 for a matched one, less for the others."""
    matched = min(objects, queries)
    return matched + NO_OBJECT_WEIGHT * (queries - matched)


def evaluate(
    model: nn.Module,
    samples: EvalSamples,
    config: Config,
    ranks: Ranks,
    say: Callable[[str], None] = print,
    stop: Callable[[], bool] = lambda: False,
    note: Callable[[str, dict], None] = lambda name, predictions: None,
) -> dict:
    """Judge a segmenter, picture after picture; nothing but sums and run lengths is kept.

    Parameters
    ----------
    model : Module
        Put into evaluation mode.
    samples : EvalSamples
    config : Config
    ranks : Ranks
    say : callable
        Told the name of each picture that cannot be used.
    stop : callable
        Asked after each picture whether to give up.
    note : callable
        Given each picture's name and predictions, as to write them.

    Returns
    -------
    dict
        Scores in percent, None where there is nothing to score; ``score``, the main one; ``images``, ``bad_images``
        and ``per_class``. Empty if stopped, or if no picture could be used.
    """
    model.eval()
    source = samples.source
    vocabulary: Vocabulary = source.vocabulary
    judges = create_judges(vocabulary, config.judge.tasks or [source.task], config.judge.areas)
    bad, count = BadImages(samples), 0
    for batch in load(samples, EvalKeys(samples, 1, ranks), config, ranks.device.type == "cuda"):
        for line in bad.note(batch):
            say(line)
        if batch.asked != batch.used:
            continue
        views = prepare_views(batch.truth.image, config) if config.judge.several else [batch.images]
        predictions = predict(
            model, views, batch.truth.image.shape[:2], judges.tasks, vocabulary, config.judge,
            autocast(config, ranks),
        )  # fmt: skip
        try:
            judges.update(batch.truth, predictions)
        except ValueError as error:
            raise UserError(str(error)) from error
        note(batch.truth.name, predictions)
        count += 1
        if stop():
            return {}
    judges.gather(ranks)
    count, missing = ranks.sums([count, len(bad.seen)])
    if not count:
        return {}
    values = without_nan(judges.compute())
    main = values.get(SCORES[source.task if source.task in judges.tasks else judges.tasks[0]])
    return {"score": main, **values, "images": int(count), "bad_images": int(missing)}


def without_nan(values: dict) -> dict:
    """Write None for numbers that are none, in nested dicts, so that JSON can hold them."""
    return {
        name: without_nan(value)
        if isinstance(value, dict)
        else (None if isinstance(value, float) and math.isnan(value) else value)
        for name, value in values.items()
    }
