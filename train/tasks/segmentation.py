"""Segmentation: pictures with masks.

The points at which masks are compared depend on (seed, step, picture), and sums are divided by what the whole step
holds, so neither the number of processes nor that of batches a step changes a result.
"""

import math
import zlib
from collections.abc import Callable

import torch
from torch import nn

from fast import SegmenterOutput
from fast.matching import NO_OBJECT_WEIGHT, SetLoss

from ..common.distributed import Ranks
from ..common.errors import UserError
from ..config.segmentation import Config
from ..data.loader import BadImages, load
from ..data.sample import Vocabulary
from ..data.sampler import EvalSampler
from ..data.segmentation import check_pictures, open_sets, pack_vocabulary
from ..data.segmentation_dataset import Batch, EvalDataset, SegmentationDataset
from ..inference.views import predict, prepare_views
from ..metrics.evaluator_list import create_evaluators
from ..models.autocast import autocast
from ..models.checkpoint import SEGMENTER
from ..models.segmenter import build_model
from .task import Task

SCORES = {"panoptic": "PQ", "instance": "AP", "semantic": "mIoU"}


class Segmentation(Task):
    """Pictures with masks.

    Parameters
    ----------
    config : Config
    """

    kind, command, config_type, needs = SEGMENTER, "train.segment", Config, ("vocabulary", "task")
    metric_name, shown = "score", ("PQ", "AP", "AP_small", "mIoU")

    def __init__(self, config: Config):
        super().__init__(config)
        self.criterion, self.num_queries = SetLoss(config.loss.points), None

    def datasets(self) -> tuple[SegmentationDataset, EvalDataset]:
        """Open the pictures; the config's number of classes is taken from them if it is open."""
        sets = open_sets(self.config)
        for samples in sets:
            check_pictures(samples.source, samples.on_bad_image)
        return sets

    def model(self, train_set: SegmentationDataset) -> nn.Module:
        """Create the config's segmenter."""
        model = build_model(self.config, train_set.class_names)
        self.num_queries = model.config.num_queries
        return model

    def counts(self, batch: Batch) -> list[float]:
        """Return the number of objects, and the weight of all queries in the class loss."""
        objects = [len(each.labels) for each in batch.objects]
        return [sum(objects), sum(class_weight(count, self.num_queries) for count in objects)]

    def loss(self, output: SegmenterOutput, targets: Batch, step: int, counts: list[float]) -> torch.Tensor:
        """Sum the pictures' losses, in float32; a step without any object counts as one with one."""
        keys = (zlib.crc32(repr((self.config.run.seed, step, index)).encode()) for index in targets.asked)
        generators = [torch.Generator(targets.images.device).manual_seed(key) for key in keys]
        objects, weight = counts
        return self.criterion(output, targets.objects, objects or 1.0, generators, weight)["loss"]

    def evaluate(
        self, model: nn.Module, samples: EvalDataset, ranks: Ranks, say: Callable[[str], None], stop: Callable[[], bool]
    ) -> dict:
        """Compute the official scores."""
        return evaluate(model, samples, self.config, ranks, say, stop)

    def checkpoint_fields(self, samples: EvalDataset) -> dict:
        """Return what a prediction needs to know of the data."""
        source = samples.source
        return {"task": source.task, "vocabulary": pack_vocabulary(source.vocabulary)}


def class_weight(objects: int, queries: int) -> float:
    """Add up the weights of one picture's queries in the class loss: 1 for a matched one, less for the others."""
    matched = min(objects, queries)
    return matched + NO_OBJECT_WEIGHT * (queries - matched)


def evaluate(
    model: nn.Module,
    samples: EvalDataset,
    config: Config,
    ranks: Ranks,
    say: Callable[[str], None] = print,
    stop: Callable[[], bool] = lambda: False,
    note: Callable[[str, dict], None] = lambda name, predictions: None,
) -> dict:
    """Evaluate a segmenter, picture after picture; nothing but sums and run lengths is kept.

    Parameters
    ----------
    model : Module
        Put into evaluation mode.
    samples : EvalDataset
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
    settings = config.evaluator
    evaluators = create_evaluators(vocabulary, settings.tasks or [source.task], settings.areas, settings.mean_precision)
    bad, count = BadImages(samples), 0
    for batch in load(samples, EvalSampler(samples, 1, ranks), config, ranks.device.type == "cuda"):
        for line in bad.note(batch):
            say(line)
        if batch.asked != batch.used:
            continue
        views = prepare_views(batch.target.image, config) if config.evaluator.several else [batch.images]
        predictions = predict(
            model, views, batch.target.image.shape[:2], evaluators.tasks, vocabulary, config.evaluator,
            autocast(config, ranks),
        )  # fmt: skip
        try:
            evaluators.update(batch.target, predictions)
        except ValueError as error:
            raise UserError(str(error)) from error
        note(batch.target.name, predictions)
        count += 1
        if stop():
            return {}
    evaluators.gather(ranks)
    count, missing = ranks.sums([count, len(bad.seen)])
    if not count:
        return {}
    values = without_nan(evaluators.compute())
    main = values.get(SCORES[source.task if source.task in evaluators.tasks else evaluators.tasks[0]])
    return {"score": main, **values, "images": int(count), "bad_images": int(missing)}


def without_nan(values: dict) -> dict:
    """Write None for numbers that are none, in nested dicts, so that JSON can hold them."""
    return {
        name: without_nan(value)
        if isinstance(value, dict)
        else (None if isinstance(value, float) and math.isnan(value) else value)
        for name, value in values.items()
    }
