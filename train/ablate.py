"""Train the same segmenter with one idea taken out at a time: ``python -m train.ablate --config NAME``.

A table like the paper's Tables 5 and 6, on Scattered Digits (with one class for all digits unless
``table.one_class`` is false) or on any data that ``train.segment`` reads, named by ``--data PATH``. Each row changes
the backbone; all else (pictures, steps, schedule, starting weights) is the same for all rows of a seed. As in the paper
a classifier comes first, here of single digits, with the row's change too, unless ``table.classify`` is null.

Each finished run is a line of a CSV file, from which a Markdown table is made beside it; the same command after an
interruption goes on with the runs that are missing.
"""

import hashlib
import json
import sys
import time
from copy import deepcopy
from pathlib import Path

from fast.models import model_config
from fast.selection import token_counts

from .ablation.pictures import Shared
from .ablation.rows import AblatedClassification, AblatedSegmentation, Config
from .ablation.table import SCORES, append_run, describe_machine, read_page, read_runs, write_table
from .common.errors import Interrupted, Parser, UserError, one_line, run_command
from .config import classification as base
from .config import segmentation
from .config.loader import check_config, closest, fields_of, help_text, load_config
from .engine.command_line import HARMLESS, clear
from .engine.loop import train
from .engine.run import Run
from .metrics.focus_ratio import measure_focus, measure_tile_focus
from .models.checkpoint import LAST
from .visualization.tokens import CELL


def main(arguments: list[str]) -> int:
    """Run the command."""
    parser = Parser("train.ablate", __doc__, help_text(Config))
    parser.add_argument("--config", required=True, help="a config's name or a YAML file")
    parser.add_argument("--rows", help="names of rows, as full,gridded; default: all of the config's")
    parser.add_argument(
        "--seeds", default="0,1,2", help="numbers, as 0,1,2 (the default); all rows of a seed come first"
    )
    parser.add_argument("--limit-minutes", type=float, help="start no run that would probably end later than this")
    parser.add_argument("--out", help="CSV file, its table beside it as .md; default: outputs/ablation_CONFIG.csv")
    options, overrides = parser.parse_known_args(arguments)
    config = load_config(options.config, overrides, Config)
    check_rows(config)
    names, seeds = choose_rows(options.rows, config), choose_seeds(options.seeds)
    path = Path(options.out or f"outputs/ablation_{Path(options.config).stem}.csv")
    if path.suffix != ".csv":
        raise UserError(f"--out {path}: name a .csv file; its table is written beside it as .md")
    runs = read_runs(path)
    check_runs(runs, config, path)
    read_page(path)
    shown = [name for name in config.table.rows if name in names or any(row == name for row, _ in runs)]
    rows = [] if shown == list(config.table.rows) else ["--rows", ",".join(shown)]
    head = describe_table(config, ["--config", options.config, *rows, "--out", str(path), *without_paths(overrides)])
    missing = [(name, seed) for seed in seeds for name in names if (name, seed) not in runs]
    print(f"{len(names) * len(seeds) - len(missing)} runs are in {path}, {len(missing)} are to be made")
    left = make_runs(missing, config, path, options.limit_minutes, head)
    write_table(path, list(config.table.rows), head)
    if left:
        print(f"{left} runs were not made for lack of time")
    print(f"the table: {path.with_suffix('.md')}" if path.exists() else "no run is finished yet")
    return 0


def describe_table(config: Config, arguments: list[str]) -> str:
    """Write the command that makes a table, and what each run may spend."""
    first, second = vary(config, next(iter(config.table.rows)))
    shown = f"{second.schedule.max_steps * second.run.total_batch:,} pictures for the segmenter"
    digits = config.data.source == "digits"
    evaluated = f"{second.data.val_length} validation pictures" if digits else "all validation pictures"
    if first:
        shown = f"{first.schedule.epochs * first.data.train_length:,} pictures for the classifier, then {shown}"
        evaluated = f"{first.data.val_length} and {evaluated}"
    return f"    python -m train.ablate {' '.join(arguments)}\n\nEvery run: {shown}; {evaluated}."


def without_paths(overrides: list[str]) -> list[str]:
    """Write PATH for where the data are, which differs between machines."""
    pairs = zip(["", *overrides], overrides, strict=False)
    return ["PATH" if before in ("--data", "--data.path", "--data.images") else text for before, text in pairs]


def check_rows(config: Config) -> None:
    """Refuse tasks without objects, what only digits have on other data, and rows whose backbone cannot be."""
    if config.data.task == "semantic" or config.model.num_classes:
        raise UserError("ablations are of objects: data.task panoptic or instance, model.num_classes null")
    if config.data.source != "digits" and (config.table.one_class or config.table.classify is not None):
        raise UserError("table.one_class and table.classify are for Scattered Digits: pass false and null for pictures")
    for name in config.table.rows:
        first, second = vary(config, name)
        networks = [(second.model.name, second.model.backbone, second.data.crop)]
        if first:
            networks.append((first.model.name, first.model.overrides, (first.data.size, first.data.size)))
        for kind, changes, size in networks:
            try:
                shape = model_config(kind, **changes)
                token_counts([-(-side // CELL) for side in size], shape.rate, shape.reserve)
            except (TypeError, ValueError) as error:
                raise UserError(f"table.rows.{name}.backbone: {one_line(error)}") from error


def vary(config: Config, name: str, seed: int = 0, folder: str = "") -> tuple[base.Config | None, Config]:
    """Create the configs of a row's trainings, classifier (or None) and segmenter, checkpoints going to ``folder``."""
    row, first = config.table.rows[name], None
    varied = apply_overrides(config, name)
    varied.model.backbone |= row.backbone
    varied.run.seed, varied.run.output = seed, f"{folder}/segment"
    if config.table.classify is not None:
        first = check_config(deepcopy(config.table.classify), base.Config)
        first.model.overrides |= {} if row.after_classifier else row.backbone
        first.run.seed, first.run.output = seed, f"{folder}/classify"
    return first, varied


def apply_overrides(config: Config, name: str) -> Config:
    """Copy a config with the keys of its training that a row sets."""
    values, known = config.model_dump(), fields_of(segmentation.Config)
    for key, value in config.table.rows[name].overrides.items():
        if key not in known:
            raise UserError(f"table.rows.{name}.overrides: unknown key {key!r}{closest(key, known)}")
        section, field = key.split(".")
        values[section][field] = value
    return check_config(values, Config)


def choose_rows(text: str | None, config: Config) -> list[str]:
    """Read --rows."""
    rows = config.table.rows
    names = [name.strip() for name in text.split(",")] if text else list(rows)
    for name in names:
        if name not in rows:
            raise UserError(f"no row {name!r}{closest(name, rows)}; there are: {', '.join(rows)}")
    return list(dict.fromkeys(names))


def choose_seeds(text: str) -> list[int]:
    """Read --seeds."""
    seeds = [each.strip() for each in text.split(",")]
    if not all(each.isdecimal() for each in seeds):
        raise UserError(f"--seeds takes whole numbers with commas between them, as 0,1,2, not {text!r}")
    return list(dict.fromkeys(int(each) for each in seeds))


def settings_of(config: Config, name: str) -> str:
    """Name all that decides what a row's runs are, but the seed: eight characters that change with any of it."""
    parts = [training.model_dump(mode="json", exclude={"table"}) for training in vary(config, name) if training]
    last, schedule = parts[-1], parts[-1]["schedule"]  # under their names when the tables that are published were made
    last["judge"] = last.pop("evaluator")
    schedule |= {"updates": schedule.pop("max_steps"), "warmup_updates": schedule.pop("warmup_steps")}
    last["data"] |= {"path": [], "images": []}  # the same data may be anywhere
    for key in HARMLESS | {"data.workers"}:
        section, field = key.split(".")
        for part in parts:
            part[section].pop(field, None)
    if last["optim"]["kind"] == "adamw":  # as all were before there was a choice
        del last["optim"]["kind"]
    text = json.dumps([parts, sorted(config.table.rows[name].without), config.table.one_class], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def check_runs(runs: dict, config: Config, path: Path) -> None:
    """Refuse to go on in a file whose runs had other settings."""
    settings = {name: settings_of(config, name) for name in config.table.rows}
    odd = sorted({name for (name, _), run in runs.items() if run["settings"] != settings.get(name)})
    if odd:
        raise UserError(f"{path} holds runs with other settings, as of row {odd[0]}: name another file by --out")


def make_runs(missing: list, config: Config, path: Path, limit: float | None, head: str) -> int:
    """Make runs, each written down before the next begins; return how many there was no time for."""
    start, longest, shared = time.monotonic(), 0.0, Shared()
    for number, (name, seed) in enumerate(missing):
        begun, used = time.monotonic(), time.process_time()
        if limit is not None and begun - start + longest > 60 * limit:
            return len(missing) - number
        try:
            run = make_run(config, name, seed, path.with_suffix(""), shared)
        except Interrupted:
            raise Interrupted(
                f"\nstopped in row {name}, seed {seed}; {path} keeps the runs before it, the same command goes on"
            ) from None
        longest = max(longest, time.monotonic() - begun)
        append_run(path, run)
        write_table(path, list(config.table.rows), head)
        scores = ", ".join(f"{score} {run[score]:.1f}" for score in SCORES if run[score] is not None)
        spent = f"{run['minutes']:.1f} minutes, {(time.process_time() - used) / 60:.2f} of processor time"
        print(f"{number + 1} of {len(missing)}: {name}, seed {seed}: {scores}; {spent}", flush=True)
    return 0


def make_run(config: Config, name: str, seed: int, folder: Path, shared: Shared) -> dict:
    """Train and evaluate a row with a seed, and return its line of the CSV file."""
    start, without = time.perf_counter(), config.table.rows[name].without
    first, varied = vary(config, name, seed, f"{folder}/{name}_{seed}")
    classifier = backbone = None
    if first:
        clear(Path(first.run.output))
        classifier = train(first, task=AblatedClassification(first, without, shared))
        backbone = classifier.folder / LAST
    clear(Path(varied.run.output))
    run = train(varied, task=AblatedSegmentation(varied, without, shared, backbone))
    return {
        "row": name,
        "seed": seed,
        **{score: run.last.get(score) for score in SCORES},
        "accuracy": 100 * classifier.last["top1"] if classifier else None,
        **{f"focus_{merge}": ratio for merge, ratio in enumerate(measure_ratios(run), 1)},
        "minutes": (time.perf_counter() - start) / 60,
        "settings": settings_of(config, name),
        **describe_machine(),
    }


def measure_ratios(run: Run) -> list[float]:
    """Measure the focus ratio after each merge, over all validation pictures."""
    backbone, samples = run.model.eval().backbone.cpu(), run.val_set
    if run.config.data.source == "digits":
        found = measure_focus(lambda images: backbone.run_stages(images)[0], samples.source.pictures, len(samples))
    else:
        found = measure_tile_focus(run.model, samples, run.config.evaluator)
    return [each.ratio for each in found]


if __name__ == "__main__":
    sys.exit(run_command(main))
