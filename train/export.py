"""Make weights that ship in the package of a trained checkpoint: NAME.safetensors, its model card and sample pictures.

    python -m train.export outputs/demo/best.pt scattered_digits --about train/cards/scattered_digits.yaml --samples 20
    python -m train.export outputs/nuclei/best.pt nuclei --samples 3f2a...,77c0... [--data PATH] [--section.key VALUE]

What is exported is evaluated: as it is stored, on the whole validation set and on the sample pictures, which are kept
with it (Scattered Digits: the first ones, which need no file), so that a test can repeat it. Matrices are stored as
float16, vectors as float32. The texts of the card come from a YAML file (``--about``; TEXTS lists what it must say),
scores in training from the ``log.jsonl`` beside the checkpoint. No path of this machine is written.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

import torch
import yaml
from safetensors.torch import save
from torch import nn

from fast.pretrained import FOLDER, HEADER, SUFFIX, SUMS

from .common.errors import Parser, UserError, one_line, run_command, writing
from .config.loader import override
from .config.section import Section
from .data.digits import CLASSES
from .data.normalization import MEAN, STD
from .engine.log import read_line
from .models.checkpoint import KIND, SEGMENTER, TRAINED, read_file
from .models.weights import kind_of, weights_of
from .release.card import TEXTS, describe_samples, score_table, write_card
from .release.scores import CONFIGS, evaluate_model, evaluate_samples, keep_samples, on_samples, open_model, samples_of

MOST_BYTES, MOST_SAMPLE_BYTES = 2 * 10**6, 200 * 10**3  # of a file of weights; of its sample pictures together
UNWRITTEN = "TO BE WRITTEN"  # in the YAML file, where a text waits for its facts
NEEDS = {KIND: TRAINED, SEGMENTER: (*TRAINED, "vocabulary", "task")}


def read_about(path: Path) -> dict:
    """Read the card's texts.

    Raises
    ------
    UserError
        No such file, no YAML, or a text that is missing, unknown or empty.
    """
    try:
        about = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"cannot read the card's texts, {path}: {one_line(error)}; it must say {', '.join(TEXTS)}"
        ) from error
    about = about if isinstance(about, dict) else {}
    wrong = [key for key in TEXTS if not isinstance(about.get(key), str) or not about[key].strip()]
    wrong += sorted(str(key) for key in set(about) - set(TEXTS))
    if wrong:
        raise UserError(f"{path}: {', '.join(wrong)} must be texts, or are unknown; it says {', '.join(TEXTS)}")
    unwritten = [key for key in TEXTS if UNWRITTEN in about[key]]
    if unwritten:
        raise UserError(f"{path}: {', '.join(unwritten)} is still to be written: put the facts for {UNWRITTEN!r}")
    return {key: text.strip() for key, text in about.items()}


def stored(weights: dict, precision: str) -> dict:
    """Round weights as they are stored: matrices to float16 if ``precision`` says so, all else floating to float32.

    Raises
    ------
    UserError
        A number is too large for float16, or none.
    """
    kinds = {
        name: torch.float16 if precision == "float16" and w.ndim > 1 else torch.float32 for name, w in weights.items()
    }
    rounded = {
        n: w.to(kinds[n]).contiguous().clone() if w.is_floating_point() else w.clone() for n, w in weights.items()
    }
    odd = [name for name, weight in rounded.items() if weight.is_floating_point() and not weight.isfinite().all()]
    if odd:
        raise UserError(f"{odd[0]} holds numbers that are no {kinds[odd[0]]}: pass --precision float32")
    return rounded


def scrubbed(config: Section) -> dict:
    """Return a training's config without what belongs to the machine or to a start from other weights."""
    plain = config.model_dump(mode="json")
    fresh = type(config)().model_dump(mode="json")
    for key in ("path", "images", "train", "val"):
        if key in plain["data"]:
            plain["data"][key] = fresh["data"][key]
    for key in ("init", "backbone_init"):
        plain["model"].pop(key, None)
    plain["run"] = fresh["run"] | {"amp": plain["run"]["amp"], "seed": plain["run"]["seed"]}
    return plain


def describe_model(model: nn.Module, state: dict, config: Section) -> dict:
    """Write down all that making the model takes, as :mod:`fast.pretrained` reads it."""
    segmenter = state["kind"] == SEGMENTER
    classes = [each["name"] for each in state["vocabulary"]["classes"]] if segmenter else state.get("classes")
    if not classes and config.data.source == "digits":
        classes = list(CLASSES)
    facts = {
        "kind": "segmenter" if segmenter else "classifier",
        "model": config.model.name,
        "backbone": vars(model.backbone.config if segmenter else model.config),
        "classes": classes or [f"class {label}" for label in range(config.model.num_classes)],
        "input": {"mean": MEAN, "std": STD, "smallest_side": 32},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    if segmenter:
        facts |= {"head": config.model.head, "head_config": vars(model.config), "task": state["task"]}
    return json.loads(json.dumps(facts))


def trained_scores(checkpoint: Path, best: float | None, names) -> dict:
    """Find in the run's log the evaluation that the checkpoint's best score comes from.

    Returns
    -------
    dict
        step, and the scores of these names; empty if there is no such line.
    """
    log = checkpoint.with_name("log.jsonl")
    lines = [line for line in map(read_line, log.read_bytes().splitlines() if log.is_file() else []) if line]
    for line in reversed([line for line in lines if line["kind"] == "eval"]):
        prefix = "ema_" if any(name.startswith("ema_") for name in line) else ""
        values = {name.removeprefix(prefix): value for name, value in line.items() if name.startswith(prefix)}
        if best is not None and best in (values.get("score"), values.get("top1")):
            scale = {name: 100 if name in ("top1", "top5") else 1 for name in names}
            kept = {name: values[name] * scale[name] for name in names if isinstance(values.get(name), int | float)}
            return {"step": line["step"]} | kept
    return {}


def commit_of() -> str:
    """Return the commit of the working tree, marked where files differ from it; empty outside of a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def export(checkpoint: Path, name: str, about: dict, samples: str, folder: Path, precision: str, overrides) -> dict:
    """Write NAME.safetensors, NAME.md and NAME_samples into a folder that is empty, and return the file's facts."""
    kind = kind_of(str(checkpoint))
    if kind not in CONFIGS:
        raise UserError(f"{checkpoint} is no checkpoint of train.classify or train.segment")
    state = read_file(checkpoint, kind, NEEDS[kind])
    config = override(state["config"], overrides, CONFIGS[kind])
    weights = stored(weights_of(state), precision)
    state = state | {"model": weights, "ema": None}
    model, path = open_model(state, config, str(checkpoint)), folder / f"{name}{SUFFIX}"
    facts = describe_model(model, state, config)
    check_size(path.name, sum(weight.nbytes for weight in weights.values()))
    pictures, what = keep_samples(state, config, samples, samples_of(path))
    check_samples(samples_of(path))
    print(f"{facts['parameters']:,} parameters; evaluating them as they are stored ...")
    scores = evaluate_model(model, state, config)
    on_few = evaluate_model(model, state, on_samples(config, pictures, samples_of(path))) if pictures else {}
    facts |= {
        "about": about,
        "commit": commit_of(),
        "precision": precision,
        "scores": scores,
        "trained_scores": trained_scores(checkpoint, state.get("best"), scores),
        "samples": {"pictures": pictures, "what": what, "scores": on_few},
        "trained": {"kind": kind, "config": scrubbed(config), "classes": facts["classes"]},
    }
    if kind == SEGMENTER:
        facts["trained"] |= {"vocabulary": state["vocabulary"], "task": state["task"]}
    data = save(weights, {HEADER: json.dumps(facts)})
    path.write_bytes(data)
    path.with_suffix(".md").write_text(write_card(name, facts, sha256(data).hexdigest(), len(data)), encoding="utf-8")
    check_size(path.name, len(data))
    if pictures and evaluate_samples(path) != on_few:
        raise UserError(f"{name}{SUFFIX} read back does not score on its samples what was measured: {on_few}")
    return facts


def check_size(name: str, size: int) -> None:
    """Refuse weights that are too large to ship."""
    if size > MOST_BYTES:
        raise UserError(
            f"{name} would have {size:,} bytes, more than {MOST_BYTES:,}: store float16, or train a smaller network"
        )


def check_samples(folder: Path) -> None:
    """Refuse sample pictures that are too large to ship, saying how large each is."""
    sizes = {each.stem: each.stat().st_size for each in sorted(folder.glob("*"))}
    if sum(sizes.values()) > MOST_SAMPLE_BYTES:
        listed = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        raise UserError(
            f"sample pictures may have {MOST_SAMPLE_BYTES:,} bytes in all: name fewer or smaller ({listed})"
        )


def check_free(folder: Path, name: str, replace: bool) -> None:
    """Refuse to write over weights unasked, and over files of these names that are no weights of ours at all.

    Raises
    ------
    UserError
        It names the file or folder.
    """
    weights, sums = folder / f"{name}{SUFFIX}", folder / SUMS
    lines = sums.read_text(encoding="utf-8", errors="replace").splitlines() if sums.is_file() else []
    listed = {line.partition("  ")[2] for line in lines}
    for path in (weights, weights.with_suffix(".md"), samples_of(weights)):
        if not path.exists():
            continue
        if weights.name not in listed:
            raise UserError(f"{path} exists and is not ours ({SUMS} does not list {weights.name}): name another --out")
        if not replace:
            raise UserError(f"{path} exists: pass --replace, or give another name")
    kept = {each.relative_to(folder).as_posix() for each in samples_of(weights).rglob("*") if each.is_file()} - listed
    if kept:
        raise UserError(f"{folder / min(kept)} is not ours ({SUMS} does not list it): move it elsewhere first")


def install(draft: Path, folder: Path, name: str) -> None:
    """Move what was written into the folder of weights, and list it in SHA256SUMS instead of what was there."""
    old, own = folder / SUMS, (f"{name}{SUFFIX}", f"{name}_samples/")
    lines = old.read_text(encoding="utf-8").splitlines() if old.is_file() else []
    lines = [line for line in lines if not line.partition("  ")[2].startswith(own)]
    written = [file for file in draft.rglob("*") if file.is_file() and file.suffix != ".md"]
    lines += [f"{sha256(f.read_bytes()).hexdigest()}  {f.relative_to(draft).as_posix()}" for f in written]
    shutil.rmtree(folder / f"{name}_samples", ignore_errors=True)
    for each in draft.iterdir():
        shutil.move(each, folder / each.name)
    ordered = sorted(lines, key=lambda line: line.partition("  ")[2])
    old.write_text("".join(f"{line}\n" for line in ordered), encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Run the command."""
    parser = Parser("train.export", __doc__, "overrides: as python -m train.segment --help lists them")
    parser.add_argument("checkpoint", help="file of train.classify or train.segment: best.pt or last.pt")
    parser.add_argument("name", help="of the weights, as in pretrained=NAME: lower-case letters, digits and _")
    parser.add_argument("--about", help="YAML file of the card's texts; default: train/cards/NAME.yaml")
    parser.add_argument("--samples", default="16", help="pictures kept: how many of the first, or names; default 16")
    parser.add_argument("--precision", choices=("float16", "float32"), default="float16", help="of stored matrices")
    parser.add_argument("--out", default=str(FOLDER), help="folder to write to; default: the package's")
    parser.add_argument("--replace", action="store_true", help="replace weights of the same name")
    options, overrides = parser.parse_known_args(arguments)
    name, folder = options.name, Path(options.out)
    if not re.fullmatch("[a-z0-9_]+", name):
        raise UserError(f"a name of weights has lower-case letters, digits and _ only, not {name!r}")
    about = read_about(Path(options.about) if options.about else Path(__file__).parent / "cards" / f"{name}.yaml")
    check_free(folder, name, options.replace)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=folder) as draft:
            facts = export(
                Path(options.checkpoint), name, about, options.samples, Path(draft), options.precision, overrides
            )
            install(Path(draft), folder, name)
    size = (folder / f"{name}{SUFFIX}").stat().st_size
    print(score_table(facts), describe_samples(facts["samples"]), sep="\n\n")
    print(f"\nwrote {folder / name}{SUFFIX} ({size:,} bytes) and {name}.md; now read the card")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
