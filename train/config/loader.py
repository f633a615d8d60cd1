"""What a run is: typed sections read from YAML, with overrides from the command line.

Every key of a YAML file is a field below; a key that is not is refused with the closest name. On the command line a
field is ``--section.key VALUE`` (``--optim.lr 1e-3``), its value read as YAML where it is no text; ``--data PATH`` is
short for training on the images under PATH (several disks: ``--data /a,/b``).
"""

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from ..common.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"
Names = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
Paths = Names
StartMethod = Literal["fork", "spawn", "forkserver"] | None


class Section(BaseModel):
    """A group of fields that refuses unknown ones."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Model(Section):
    """Which network."""

    name: str = Field("aff_mini", description="a name of fast.list_models()")
    num_classes: int = Field(1000, ge=1, description="number of classes")
    drop_path: float | None = Field(None, ge=0, lt=1, description="last block's rate; null: the variant's own")
    overrides: dict[str, Any] = Field({}, description="further arguments of fast.create_model, such as rate: 0.2")
    init_gain: float | None = Field(None, gt=0, description="first weights: std gain / sqrt(inputs); null: 0.02")
    init: str | None = Field(None, description="weights to start from, ours or official; another head is replaced")
    grad_checkpointing: bool = Field(False, description="recompute activations in the backward pass to save memory")


class Data(Section):
    """Where the images come from."""

    source: Literal["images", "digits"] = Field("images", description="images on disk, or Scattered Digits")
    path: Paths = Field([], description="folders that each hold train/ and val/ (class folders, or .tar shards)")
    train: Paths = Field([], description="shard patterns for training instead of path, as /a/train-{000..127}.tar")
    val: Paths = Field([], description="shard patterns for validation instead of path")
    size: int = Field(224, ge=32, description="side of the square the network sees, pixels")
    test_resize: int = Field(256, ge=32, description="short side before the test crop, pixels")
    workers: int = Field(8, ge=0, description="loader processes of each rank")
    start_method: StartMethod = Field(None, description="how they are started; null: Python's default on this system")
    shuffle_block: int = Field(16, ge=1, description="shards mixed with one another at a time")
    on_bad_image: Literal["skip", "stop"] = Field("skip", description="skip: use the next readable image, and count")
    digits: dict[str, Any] = Field({}, description="fields of DigitsConfig, for source: digits")
    digits_first: dict[str, Any] = Field({}, description="fields of DigitsConfig that differ in the first epochs")
    first_epochs: int = Field(0, ge=0, description="epochs that train on digits_first, for source: digits")
    train_length: int = Field(10000, ge=1, description="pictures an epoch, for source: digits")
    val_length: int = Field(1000, ge=1, description="validation pictures, for source: digits")


class Augment(Section):
    """What is done to training images."""

    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    scale: tuple[float, float] = Field((0.08, 1.0), description="share of the area a random crop takes")
    randaugment: str | None = Field("rand-m9-mstd0.5-inc1", description="timm's RandAugment string, or null")
    color_jitter: float = Field(0.4, ge=0, description="colour jitter; timm leaves it out where RandAugment is on")
    erasing: float = Field(0.25, ge=0, le=1, description="probability of random erasing")
    mixup: float = Field(0.8, ge=0, description="mixup's alpha; 0: off")
    cutmix: float = Field(1.0, ge=0, description="cutmix's alpha; 0: off")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="label smoothing")


class Optim(Section):
    """AdamW and its limits."""

    lr: float | None = Field(None, gt=0, description="peak learning rate; null: lr_per_512 x total batch / 512")
    lr_per_512: float = Field(5e-4, gt=0, description="peak learning rate for a total batch of 512")
    weight_decay: float = Field(0.05, ge=0, description="none is put on 1-D parameters")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's betas")
    clip: float = Field(5.0, gt=0, description="largest norm of the whole gradient")
    freeze: Names = Field([], description="modules or parameters kept as they are: backbone, stages.0, *norm*")
    layer_decay: float | None = Field(
        None, gt=0, le=1, description="a layer's learning rate, as a multiple of the next's"
    )


class Schedule(Section):
    """Linear warm-up, then cosine, set at every update."""

    epochs: int = Field(300, ge=1, description="epochs in all, warm-up included")
    warmup_epochs: int = Field(20, ge=0, description="epochs of warm-up")
    warmup_lr: float = Field(5e-7, ge=0, description="learning rate of the first update")
    min_lr: float = Field(5e-6, ge=0, description="learning rate at the end")


class Run(Section):
    """How and where it runs."""

    output: str = Field("outputs/run", description="folder for checkpoints and logs")
    seed: int = Field(0, ge=0, description="seed of everything random")
    total_batch: int = Field(4096, ge=1, description="images an update, over all ranks and accumulation steps")
    batch_size: int = Field(128, ge=1, description="images a rank's forward pass sees")
    device: str = Field("auto", description="auto, cpu or cuda")
    amp: Annotated[Literal["off", "bf16", "fp16"], BeforeValidator(lambda value: value or "off")] = Field(
        "bf16", description="autocast's precision"
    )
    compile: bool = Field(False, description="torch.compile the model")
    batch_norm: Literal["local", "sync", "frozen"] = Field(
        "local", description="each rank's own statistics, over all ranks (GPU only), or the stored ones unchanged"
    )
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the averaged weights; 0: off")
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; null: torch's choice")
    log_every: int = Field(50, ge=1, description="updates between log lines")
    save_every: int = Field(500, ge=1, description="updates between checkpoints; each epoch's end saves too")
    eval_every: int = Field(1, ge=1, description="epochs between evaluations")
    tensorboard: bool = Field(True, description="write TensorBoard files where the package is installed")


class Config(Section):
    """A whole run of train.classify."""

    folder: ClassVar[Path] = CONFIGS

    model: Model = Model()
    data: Data = Data()
    augment: Augment = Augment()
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    run: Run = Run()

    @model_validator(mode="after")
    def even_batches(self):
        """Mixing pairs images, so each forward pass must see an even number."""
        if self.run.batch_size % 2 and (self.augment.mixup or self.augment.cutmix):
            raise ValueError(f"run.batch_size must be even for mixup and cutmix (it is {self.run.batch_size})")
        return self


def config_names(kind: type[Section] = Config) -> list[str]:
    """List the names of the configs of a kind that come with the project."""
    return sorted(path.stem for path in kind.folder.glob("*.yaml"))


def load_config(name: str, overrides: list[str] = (), kind: type[Section] = Config):
    """Read a config and apply command-line overrides.

    Parameters
    ----------
    name : str
        A name of ``config_names(kind)`` or the path of a YAML file.
    overrides : list of str
        Alternating ``--section.key`` and value, or ``--section.key=value``.
    kind : type
        The sections expected: this file's Config, or another with a ``folder`` of YAML files.

    Returns
    -------
    Config
        Of ``kind``.

    Raises
    ------
    UserError
        Unknown config, key or value, each named in one line.
    """
    return override(read_yaml(find_config(name, kind), kind), overrides, kind)


def override(values: dict, overrides: list[str], kind: type[Section] = Config):
    """Make a Config of nested dicts (of a file or a checkpoint) and command-line overrides."""
    for key, text in pair_overrides(overrides):
        put_override(values, key, text, kind)
    return check_config(values, kind)


def find_config(name: str, kind: type[Section] = Config) -> Path:
    """Find a config's file by name or path."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else kind.folder / f"{name}.yaml"
    if path.is_file():
        return path
    names = config_names(kind)
    raise UserError(f"no config {name!r}{closest(name, names)}; there are: {', '.join(names)}")


def read_yaml(path: Path, kind: type[Section] = Config) -> dict:
    """Read a YAML file that holds a mapping of sections."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable as YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold sections ({', '.join(kind.model_fields)}), not a {type(values).__name__}")
    return values


def pair_overrides(arguments: list[str]) -> list[tuple[str, str]]:
    """Split ``--a.b 1 --c.d=2`` into [("a.b", "1"), ("c.d", "2")]."""
    pairs, rest = [], list(arguments)
    while rest:
        key, equals, text = rest.pop(0).partition("=")
        if not key.startswith("--"):
            raise UserError(f"unexpected argument {key!r}; overrides look like --optim.lr 1e-3")
        if not equals:
            if not rest:
                raise UserError(f"{key} needs a value")
            text = rest.pop(0)
        pairs.append((key[2:], text))
    return pairs


def put_override(values: dict, key: str, text: str, kind: type[Section] = Config) -> None:
    """Set one dotted key of the nested dict from the text of the command line."""
    if key == "data":
        paths = [at_home(path) for path in text.split(",")]
        values["data"] = (values.get("data") or {}) | {"source": "images", "path": paths}
        return
    value = read_text(text, fields_of(kind)[key].annotation) if takes_text(kind, key, text) else read_value(key, text)
    *sections, last = key.split(".")
    for section in sections:
        if not isinstance(values.get(section), dict):
            values[section] = {}
        values = values[section]
    values[last] = value


def takes_text(kind: type[Section], key: str, text: str) -> bool:
    """Whether a key's value is text, or a list of texts of which one is given: no YAML, to which "exp #3" is "exp"."""
    field = fields_of(kind).get(key)
    if field is None:
        return False
    kinds = set(get_args(field.annotation) or [field.annotation])
    return kinds <= {str, type(None)} and (field.annotation != list[str] or not text.lstrip().startswith("["))


def read_text(text: str, annotation) -> str | None:
    """Take text as it is; null is none where the field may be empty, and ~/ is the home folder."""
    return None if text == "null" and type(None) in get_args(annotation) else at_home(text)


def at_home(path: str) -> str:
    """Put the home folder where a path begins with ~/, which shells do not do within --key=~/path."""
    return os.path.expanduser(path) if path.startswith("~/") else path


def read_value(key: str, text: str):
    """Read a value as YAML, and 1e-3 as a number too (YAML itself wants 1.0e-3)."""
    if text.startswith("*"):  # a pattern of names, which YAML takes for a reference
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--{key}: cannot read {text!r} as a value") from error
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def check_config(values: dict, kind: type[Section] = Config):
    """Turn nested dicts into a Config, or name the first key that is wrong."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(describe(error.errors()[0], known_keys(kind))) from error


def describe(problem: dict, known: dict[str, str]) -> str:
    """Put one of pydantic's problems into one line."""
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}{closest(key, known)}"
    if not key or problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"{key}: {problem['msg']} (it is {problem['input']!r})"


def known_keys(kind: type[Section] = Config) -> dict[str, str]:
    """Map every dotted key to its description."""
    return {key: field.description for key, field in fields_of(kind).items()}


def fields_of(kind: type[Section]) -> dict[str, FieldInfo]:
    """Map every dotted key to its field."""
    return {
        f"{name}.{key}": field
        for name, section in kind.model_fields.items()
        for key, field in section.annotation.model_fields.items()
    }


def help_text(kind: type[Section] = Config) -> str:
    """List every key with default and description, for ``--help``."""
    lines = ["overrides (also the keys of a config file), with their defaults:"]
    defaults = kind()
    for key, description in known_keys(kind).items():
        section, name = key.split(".")
        lines.append(f"  --{key:28} {description} [{getattr(getattr(defaults, section), name)}]")
    return "\n".join(lines) + f"\nconfigs: {', '.join(config_names(kind))}"


def closest(name: str, known) -> str:
    """Say which known name is nearest, as the tail of a sentence."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""
