"""What a run is: typed sections read from YAML, with overrides from the command line.

Every key of a YAML file is a field below; a key that is not is refused with the closest name. On the command line a
field is ``--section.key VALUE`` (``--optim.lr 1e-3``), its value read as YAML where it is no text; ``--data PATH`` is
short for training on the images under PATH (several disks: ``--data /a,/b``).
"""

import difflib
import os
from pathlib import Path
from typing import get_args

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from ..common.errors import UserError
from .classification import Config
from .section import Section


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
    """Create a Config of nested dicts (of a file or a checkpoint) and command-line overrides."""
    values = kind.present_names(values)
    for key, text in pair_overrides(overrides):
        put_override(values, kind.present_key(key), text, kind)
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
    except (yaml.YAMLError, ValueError, RecursionError) as error:
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
    """Replace a leading ~/ of a path by the home folder, which shells do not do within --key=~/path."""
    return os.path.expanduser(path) if path.startswith("~/") else path


def read_value(key: str, text: str):
    """Read a value as YAML, and 1e-3 as a number too (YAML itself wants 1.0e-3)."""
    if text.startswith("*"):  # a pattern of names, which YAML takes for a reference
        return text
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none, too many digits
        raise UserError(f"--{key}: cannot read {text[:60]!r} as a value") from error
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
    """Describe one of pydantic's problems in one line."""
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}{closest(key, known)}"
    if not key or problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    inside = [name for name in known if name.startswith(f"{key}.")]
    if problem["type"] == "model_type" and inside:
        return f"{key} is a group of options, not {problem['input']!r}: set one of them, as {inside[0]}"
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
    """Return the nearest known name, as the tail of a sentence."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""
