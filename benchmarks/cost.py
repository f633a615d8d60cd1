"""Draw the AP of an ablation's rows over what a forward pass of each costs: milliseconds and operations.

python -m benchmarks.cost CSV --config small_digits --rows full,gridded,rate_1_5 [--out PICTURE]

Reads the scores from the CSV file of ``train.ablate``, of the seeds that all rows have; makes each row's network and
measures it on one validation picture at a time, on one thread, the rows in turn; prints the table and draws CSV's name
with .png. The networks are not trained: what they cost depends on how many tokens stay, not on which.
"""

import statistics
import sys
from functools import partial
from pathlib import Path

import matplotlib.figure
import torch

from train.ablate import choose_rows, vary
from train.ablation.pictures import Shared
from train.ablation.rows import AblatedSegmentation, Config
from train.ablation.table import read_runs
from train.common.errors import Parser, UserError, run_command
from train.config.loader import load_config
from train.data.normalization import to_input

from .clock import seconds
from .flops import count_flops
from .measure import alternate
from .results import check_free, write_picture

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
    config = load_config(options.config, overrides, Config)
    runs, names, seeds = choose_runs(options.table, config, options.rows)
    rows = {name: [runs[name, seed]["AP"] for seed in seeds] for name in names}
    picture = options.out or options.table.with_suffix(".png")
    check_free(picture)
    costs = measure_rows(config, names)
    print(f"mean over seeds {', '.join(map(str, seeds))}")
    for name, values in rows.items():
        milliseconds, flops = costs[name]
        mean = statistics.mean(values)
        print(f"{name:20} AP {mean:5.1f}  {milliseconds:6.2f} ms  {flops / 1e6:7.1f} million operations")
    write_picture(picture, draw(rows, costs))
    return 0


def choose_runs(table, config, rows):
    """Read a table of train.ablate: its runs, the names of --rows that it has, and the seeds that all of them have."""
    runs = read_runs(table)
    names = [name for name in choose_rows(rows, config) if any(row == name for row, _ in runs)]
    seeds = sorted({seed for _, seed in runs if all((name, seed) in runs for name in names)})
    if not names or not seeds:
        raise UserError(f"{table} has no seed with all of these rows: run python -m train.ablate first")
    return runs, names, seeds


def measure_rows(config, names):
    """Measure rows' networks: name -> (least milliseconds, floating-point operations) of a forward pass."""
    torch.set_num_threads(1)
    networks, shared = {}, Shared()
    for name in names:
        row = vary(config, name)[1]
        task = AblatedSegmentation(row, config.table.rows[name].without, shared, None)
        train_set, val_set = task.datasets()
        networks[name] = task.model(train_set).eval()
    images = [to_input(val_set.source.load(index).image) for index in range(PICTURES)]

    @torch.inference_mode()
    def run(network, image):
        return network(image)

    times = dict.fromkeys(names, 0.0)
    for image in images:
        calls = [partial(run, network, image) for network in networks.values()]
        for name, rounds in zip(names, alternate(calls, ROUNDS, float("inf"), clock), strict=True):
            times[name] += 1000 * min(rounds) / len(images)
    return {name: (times[name], count_flops(networks[name], images[0])) for name in names}


def clock(call):
    """Time one call on the CPU, in seconds."""
    return seconds(call, torch.device("cpu"))


def draw(rows, costs):
    """Return a figure with AP over milliseconds and over operations: each seed's rows joined by a line, and means."""
    figure = matplotlib.figure.Figure(figsize=(9, 3.8), layout="constrained")
    labels = ("forward pass of one picture, ms (one thread)", "forward pass of one picture, million operations")
    for place, (axes, label) in enumerate(zip(figure.subplots(1, 2, sharey=True), labels, strict=True)):
        along = [costs[name][place] / (1, 1e6)[place] for name in rows]
        for values in zip(*rows.values(), strict=True):
            axes.plot(along, values, color="0.75", linewidth=1, marker=".", zorder=1)
        for x, (name, values), colour in zip(along, rows.items(), COLOURS * len(rows), strict=False):
            axes.scatter(x, statistics.mean(values), s=60, color=colour, label=name, zorder=2)
        axes.set(xlabel=label)
        axes.grid(True, color="0.9")
    figure.axes[0].set(ylabel="AP on validation pictures, %")
    handles, names = figure.axes[0].get_legend_handles_labels()
    names = [f"{name}, mean" for name in names[:-1]] + [f"{names[-1]}, mean; grey: seeds"]
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), fontsize=8, frameon=False)
    return figure


if __name__ == "__main__":
    sys.exit(run_command(main))
