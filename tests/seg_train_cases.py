"""Runs, models and batches that the tests of training a segmenter share."""

import torch

from fast.matching import Objects
from train.common.distributed import Ranks
from train.config.loader import load_config
from train.config.segmentation import Config
from train.data.segmentation_dataset import Batch
from train.engine.loop import train
from train.engine.run import Run
from train.models.segmenter import build_model
from train.tasks.segmentation import Segmentation

KIND = "autofocusformer segmentation checkpoint 1"


def config_of(*overrides, name="digits_panoptic_smoke"):
    """Read a config of train.segment with overrides."""
    return load_config(name, [str(each) for each in overrides], Config)


def run_of(config):
    """Make a run that is not started."""
    return Run(config, Ranks("cpu"), Segmentation(config))


def fit(folder, *overrides):
    """Train, and return the run."""
    config = config_of("--run.output", folder, *overrides)
    return train(config, task=Segmentation(config))


def model_of(*overrides):
    """Make the smoke config's segmenter."""
    return build_model(config_of("--model.num_classes", 16, *overrides))


def empty(batch):
    """Take all objects out of a batch."""
    none = Objects(torch.zeros(0, dtype=torch.int64), torch.zeros(0, *batch.images.shape[2:], dtype=torch.bool))
    return Batch(batch.images, [none] * len(batch.objects), batch.asked, batch.used)
