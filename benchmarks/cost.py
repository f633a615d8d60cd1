"""Draw the AP of an ablation's rows over what a forward pass of each costs: milliseconds and operations.

python -m benchmarks.cost CSV --config small_digits --rows full,gridded,rate_1_5 [--out PICTURE]

Reads the scores from the CSV file of ``train.ablate``, of the seeds that all rows have; makes each row's network and
measures it on one validation picture at a time (on a corner of a tile's size where the config evaluates in tiles), on
one thread, the rows in turn; prints the table and draws CSV's name with .png. The networks are not trained: what they
cost depends on how many tokens stay, not on which.
"""

import statistics
import sys
from functools import partial

import matplotlib.figure
import torch

from train.ablate import vary
from train.ablation.pictures import Shared
from train.ablation.rows import AblatedSegmentation
from train.common.errors import run_command
from train.data.normalization import to_input

from .ablation import COLOURS, read_ablation
from .clock import seconds
from .flops import count_flops
from .measure import alternate
from .results import write_picture

PICTURES, ROUNDS = 20, 15


def main(arguments):
    """Run the command."""
    table = read_ablation("benchmarks.cost", __doc__.splitlines()[0], arguments, ".png")
    rows = {name: table.values(name, "AP") for name in table.rows}
    costs = measure_rows(table.config, table.rows)
    print(f"mean over seeds {', '.join(map(str, table.seeds))}")
    for name, values in rows.items():
        milliseconds, flops = costs[name]
        mean = statistics.mean(values)
        print(f"{name:20} AP {mean:5.1f}  {milliseconds:6.2f} ms  {flops / 1e6:7.1f} million operations")
    write_picture(table.picture, draw(rows, costs))
    return 0


def measure_rows(config, names):
    """Measure rows' networks: name -> (least milliseconds, floating-point operations) of a forward pass."""
    torch.set_num_threads(1)
    networks, shared = {}, Shared()
    for name in names:
        row = vary(config, name)[1]
        task = AblatedSegmentation(row, config.table.rows[name].without, shared, None)
        train_set, val_set = task.datasets()
        networks[name] = task.model(train_set).eval()
    tile = slice(config.evaluator.tile)
    images = [to_input(val_set.source.load(index).image)[..., tile, tile] for index in range(PICTURES)]

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
    labels = ("forward pass, ms (one thread)", "forward pass, million operations")
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
