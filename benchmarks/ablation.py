"""What the pictures of an ablation are drawn from: the runs of ``train.ablate`` that a command line chooses."""

from dataclasses import dataclass
from pathlib import Path

from train.ablate import choose_rows
from train.ablation.rows import Config
from train.ablation.table import read_runs
from train.common.errors import Parser, UserError
from train.config.loader import load_config

from .results import check_free

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito


@dataclass(frozen=True)
class Ablation:
    """Runs of a table: ``runs[row, seed]`` for all ``rows`` and ``seeds``, and the ``picture`` to write."""

    config: Config
    runs: dict[tuple[str, int], dict]
    rows: list[str]
    seeds: list[int]
    picture: Path

    def values(self, row, score):
        """Return a row's scores, in percent, a seed each."""
        return [self.runs[row, seed][score] for seed in self.seeds]


def read_ablation(name, description, arguments, ending):
    """Read a command line ``CSV --config NAME [--rows a,b] [--out PICTURE] [--section.key VALUE]``, and its table.

    Rows are those of ``--rows`` that the table has, seeds those that all of these rows have; the picture is CSV's name
    with ``ending`` unless ``--out`` names another.

    Raises
    ------
    UserError
        No seed has all of the rows; the picture would be written over a file of someone else.
    """
    parser = Parser(name, description)
    parser.add_argument("table", type=Path, help="CSV file of train.ablate")
    parser.add_argument("--config", required=True, help="its config")
    parser.add_argument("--rows", help="names of rows, as full,gridded; default: all that the file has")
    parser.add_argument("--out", type=Path, help=f"picture to write; default: CSV's name with {ending}")
    options, overrides = parser.parse_known_args(arguments)
    config = load_config(options.config, overrides, Config)
    runs = read_runs(options.table)
    rows = [name for name in choose_rows(options.rows, config) if any(row == name for row, _ in runs)]
    seeds = sorted({seed for _, seed in runs if all((name, seed) in runs for name in rows)})
    if not rows or not seeds:
        raise UserError(f"{options.table} has no seed with all of these rows: run python -m train.ablate first")
    picture = options.out or options.table.with_name(options.table.stem + ending)
    check_free(picture)
    return Ablation(config, runs, rows, seeds, picture)
