"""Train transformers' Mask2Former with a Swin beside ours: same pictures, same loss, as much processor time.

python -m benchmarks.rival --config nuclei --data PATH [--seeds 0] [--networks swin,aff] [--out CSV]

``aff`` is the first row of a config of ``train.ablate``; ``swin`` has about as many parameters, as many queries and
layers of the head, and our loss, which is theirs (``parity_tests/test_set_loss.py``). It trains for as many steps as
take the same processor time: both are measured for PROBE steps first, in turn. Time is that of the process, not of the
clock on the wall, so that other work beside it matters little. The learning rate and the gain of the first weights are
the config's, chosen for ours. Runs that the CSV file has are not made again.
"""

import csv
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from fast import SegmenterOutput
from fast.models import model_config
from train.ablate import check_rows, choose_seeds, vary
from train.ablation.pictures import Shared
from train.ablation.rows import AblatedSegmentation, Config
from train.ablation.table import as_line, describe_machine
from train.common.distributed import Ranks
from train.common.errors import Parser, UserError, run_command
from train.config.loader import load_config
from train.data.loader import load
from train.engine.loop import train, train_step
from train.engine.run import Run
from train.models.classifier import draw_weights

SCORES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
COLUMNS = ("network", "seed", "parameters", "steps", "pictures", "training_cpu_minutes", *SCORES, "machine", "versions")
PROBE, WARM = 12, 3  # steps measured, and those before
EMBED_DIM = 9  # channels of Swin's first stage, doubled by every further one


class Timed(AblatedSegmentation):
    """A row's training that adds up the processor time of its evaluations."""

    evaluating = 0.0

    def evaluate(self, *arguments, **options) -> dict:
        """Compute the official scores."""
        start = time.process_time()
        values = super().evaluate(*arguments, **options)
        self.evaluating += time.process_time() - start
        return values


class SwinSegmentation(Timed):
    """The same with transformers' network."""

    def model(self, train_set) -> nn.Module:
        """Create the network; its number of queries is the config's."""
        model = SwinSegmenter(self.config.model)
        self.num_queries = model.config.num_queries
        return model


class SwinSegmenter(nn.Module):
    """transformers' Mask2Former with a Swin whose depths and MLP ratio are those of a config's backbone.

    Parameters
    ----------
    section : train.config.segmentation.Model
        ``num_classes`` must be known; ``overrides`` as of ``fast.HeadConfig``.
    """

    def __init__(self, section):
        super().__init__()
        import transformers

        ours, head = model_config(section.name), section.overrides
        width = head["hidden_dim"]
        swin = transformers.SwinConfig(
            embed_dim=EMBED_DIM, depths=list(ours.depths), num_heads=[1, 2, 4, 8], window_size=4,
            mlp_ratio=ours.mlp_ratio, drop_path_rate=0.0, out_features=[f"stage{i}" for i in (1, 2, 3, 4)],
        )  # fmt: skip
        self.config = transformers.Mask2FormerConfig(
            backbone_config=swin, num_labels=section.num_classes, num_queries=head["num_queries"],
            feature_size=width, mask_feature_size=width, hidden_dim=width, num_attention_heads=head["heads"],
            encoder_layers=head["encoder_layers"], encoder_feedforward_dim=head["encoder_ffn"],
            decoder_layers=head["decoder_layers"] + 1, dim_feedforward=head["decoder_ffn"],
        )  # fmt: skip  # theirs counts the prediction before the first layer
        self.network = transformers.Mask2FormerForUniversalSegmentation(self.config)
        if section.init_gain is not None:
            draw_weights(self.network.model.pixel_level_module.encoder, section.init_gain)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that are no matrices of a layer: Swin's tables of position biases, the levels' codes."""
        ends = ("relative_position_bias_table", "level_embed")
        return {name for name, _ in self.named_parameters() if name.endswith(ends)}

    def get_classifier(self) -> nn.Module:
        """Return the layer that gives the classes' logits."""
        return self.network.class_predictor

    def forward(self, images: torch.Tensor) -> SegmenterOutput:
        """(B, 3, H, W) float32 -> logits of classes and masks, and those of each layer in training."""
        found = self.network(pixel_values=images, output_auxiliary_logits=True)
        return SegmenterOutput(found.class_queries_logits, found.masks_queries_logits, list(found.auxiliary_logits))


NETWORKS = {"aff": Timed, "swin": SwinSegmentation}


def main(arguments):
    """Run the command."""
    parser = Parser("benchmarks.rival", __doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="a config's name of train.ablate, or a YAML file")
    parser.add_argument("--seeds", default="0", help="numbers, as 0,1,2; default: 0")
    parser.add_argument("--networks", default="swin,aff", help="of swin and aff; default: both")
    parser.add_argument("--out", type=Path, help="CSV file; default: outputs/rival_CONFIG.csv")
    options, overrides = parser.parse_known_args(arguments)
    config = load_config(options.config, overrides, Config)
    check_rows(config)
    names, seeds = options.networks.split(","), choose_seeds(options.seeds)
    if odd := set(names) - set(NETWORKS):
        raise UserError(f"no network {min(odd)!r}; there are: {', '.join(NETWORKS)}")
    if config.table.classify is not None:
        raise UserError("the rival trains without a classifier first: pass --table.classify null")
    path = options.out or Path(f"outputs/rival_{Path(options.config).stem}.csv")
    done = read_done(path)
    shared, row = Shared(), next(iter(config.table.rows))
    for seed in seeds:
        for name in [name for name in names if (name, str(seed)) not in done]:
            make = partial(vary, config, row, seed)
            steps = config.schedule.max_steps if name == "aff" else matched_steps(make, shared)
            add_run(path, make_run(name, seed, make, shared, steps))
    return 0


def read_done(path):
    """Return the (network, seed) of the runs that a file has."""
    if not path.exists():
        return set()
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise UserError(f"{path} is no table of benchmarks.rival: name another file by --out")
        return {(line["network"], line["seed"]) for line in reader}


def add_run(path, run):
    """Append a run to the file and print it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = "" if path.exists() else as_line(COLUMNS)
    with open(path, "a", encoding="utf-8") as file:
        file.write(head + as_line([run[name] for name in COLUMNS]))
    print(", ".join(f"{name} {run[name]}" for name in COLUMNS[:-2]), flush=True)


def matched_steps(make, shared):
    """Return how many steps of the rival take the processor time of all of ours."""
    with TemporaryDirectory() as folder:
        runs = []
        for name, kind in NETWORKS.items():
            varied = make(f"{folder}/{name}")[1]
            runs.append(Run(varied, Ranks("cpu"), kind(varied, [], shared, None)))
        times = step_times(runs)
    print(f"processor time of a step: ours {times[0]:.3f} s, the rival's {times[1]:.3f} s", flush=True)
    return round(runs[0].total * times[0] / times[1])


def step_times(runs):
    """Measure a step of each run, the runs in turn: medians of the process's time, in seconds."""
    times = [[] for _ in runs]
    streams = [load(run.train_set, run.progress.sampler(run.ranks, 0, 0), run.config, False) for run in runs]
    for _ in range(WARM + PROBE):
        for run, stream, took in zip(runs, streams, times, strict=True):
            start = time.process_time()
            train_step(run, [next(stream)])
            took.append(time.process_time() - start)
            run.step += 1
    return [statistics.median(took[WARM:]) for took in times]


def make_run(name, seed, make, shared, steps):
    """Train and evaluate a network, and return its line of the file."""
    with TemporaryDirectory() as folder:
        varied = make(folder)[1]
        varied.schedule.max_steps = steps
        task, start = NETWORKS[name](varied, [], shared, None), time.process_time()
        run = train(varied, task=task)
        minutes = (time.process_time() - start - task.evaluating) / 60
    return {
        "network": name,
        "seed": seed,
        "parameters": sum(each.numel() for each in run.model.parameters()),
        "steps": steps,
        "pictures": steps * varied.run.total_batch,
        "training_cpu_minutes": round(minutes, 3),
        **{score: None if run.last.get(score) is None else round(run.last[score], 3) for score in SCORES},
        **describe_machine(),
    }


if __name__ == "__main__":
    sys.exit(run_command(main))
