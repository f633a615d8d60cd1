"""Draw the AP of an ablation's rows over what a forward pass of each costs: milliseconds and operations.

python -m benchmarks.cost CSV --config small_digits --rows full,gridded,rate_1_5 [--out PICTURE]

Reads the scores from the CSV file of ``train.ablate``, makes each row's network and measures it on one validation
picture at a time, on one thread, the rows in turn; prints the table and draws CSV's name with .png. The networks are
not trained: what they cost depends on how many tokens stay, not on which.
"""

import statistics
import sys
from pathlib import Path

import matplotlib.figure
import torch

from train.ablate import choose_rows, vary
from train.ablation.rows import AblatedSegmentation, Config, Shared
from train.ablation.table import margin, read_runs
from train.common.errors import Parser, UserError, run_command
from train.config.loader import load_config
from train.data.normalization import to_input

from .flops import count_flops
from .measure import alternate, seconds

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
PICTURES, ROUNDS = 20, 15


def main(arguments):
    """Run the command."""
    parser = Parser("benchmarks.cost", __doc__.splitlines()[0])
    parser.add_argument("table", type=Path, help="CSV file of train.ablate")
    parser.add_argument("--config", required=True, help="its config")
    parser.add_argument("--rows", help="names of rows, as full,gridded; default: all that the file has")
    parser.add_argument("--out", type=Path, help="picture to write; default: beside the CSV file")
    options, overrides = parser.parse_known_args(arguments)
    config, runs = load_config(options.config, overrides, Config), read_runs(options.table)
    scores = {name: [run["AP"] for (row, _), run in runs.items() if row == name] for name in config.table.rows}
    rows = {name: scores[name] for name in choose_rows(options.rows, config) if scores[name]}
    if not rows:
        raise UserError(f"{options.table} has none of these rows: run python -m train.ablate first")
    costs = measure_rows(config, list(rows))
    for name, values in rows.items():
        around = f" ± {margin(values):.1f}" if len(values) > 1 else ""
        milliseconds, flops = costs[name]
        print(
            f"{name:20} AP {statistics.mean(values):5.1f}{around} ({len(values)} seeds)  "
            f"{milliseconds:6.2f} ms  {flops / 1e6:7.1f} million operations"
        )
    draw(rows, costs).savefig(options.out or options.table.with_suffix(".png"), dpi=150)
    return 0


def measure_rows(config, names):
    """Measure rows' networks: name -> (median milliseconds, floating-point operations) of a picture's forward pass."""
    torch.set_num_threads(1)
    networks, shared = {}, Shared()
    for name in names:
        row = vary(config, name)[1]
        task = AblatedSegmentation(row, config.table.rows[name].without, shared, None)
        train_set, val_set = task.datasets()
        networks[name] = task.model(train_set).eval()
    images = [to_input(val_set.source.load(index).image) for index in range(PICTURES)]

    @torch.inference_mode()
    def run(network):
        for image in images:
            network(image)

    calls = [lambda network=network: run(network) for network in networks.values()]
    times = alternate(calls, ROUNDS, float("inf"), lambda call: seconds(call, torch.device("cpu")))
    return {
        name: (1000 * statistics.median(each) / PICTURES, count_flops(network, images[0]))
        for (name, network), each in zip(networks.items(), times, strict=True)
    }


def draw(rows, costs):
    """Return a figure with AP over milliseconds and over operations; bars are 95 % intervals of the mean."""
    figure = matplotlib.figure.Figure(figsize=(9, 3.8), layout="constrained")
    labels = ("forward pass of one picture, ms (one thread)", "forward pass of one picture, million operations")
    for place, (axes, label) in enumerate(zip(figure.subplots(1, 2, sharey=True), labels, strict=True)):
        for (name, values), colour in zip(rows.items(), COLOURS * len(rows), strict=False):
            cost = costs[name][place] / (1, 1e6)[place]
            bar = margin(values) if len(values) > 1 else 0
            axes.errorbar(cost, statistics.mean(values), bar, marker="o", capsize=4, color=colour, label=name)
        axes.set(xlabel=label)
        axes.grid(True, color="0.9")
    figure.axes[0].set(ylabel="AP on validation pictures, %")
    figure.axes[0].legend(fontsize=8, frameon=False)
    return figure


if __name__ == "__main__":
    sys.exit(run_command(main))
