"""The set-up files agree with each other: pyproject.toml, environment.yml, constraints.txt."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base", "huggingface-hub": "huggingface_hub"}


def project():
    """Return the [project] table of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements():
    """Return every requirement of pyproject.toml, extras included, as a dict from name to specifier."""
    table = project()
    lines = table["dependencies"] + [line for extra in table["optional-dependencies"].values() for line in extra]
    return dict(re.fullmatch(r"([\w-]+)(.*)", line).groups() for line in lines)


def environment():
    """Return the conda and the pip dependencies of environment.yml, each a list of lines."""
    lines = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    return [line for line in lines if isinstance(line, str)], lines[-1]["pip"]


def test_environment_holds_every_requirement():
    conda, pip = environment()
    expected = {CONDA_NAMES.get(name, name) + version for name, version in requirements().items()}
    assert expected <= set(conda) | set(pip)


def test_environment_has_what_the_user_asked_for():
    conda, pip = environment()
    names = {re.split(r"[<>=]", line)[0] for line in conda + pip}
    assert {"pytorch", "numpy", "scipy", "jupyterlab", "nbval", "cupy-cuda12x"} <= names
    assert pip[-1] == "--no-deps -e ." and len(pip) == 5


def test_environment_uses_conda_forge_alone_and_pins_cuda():
    text = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert text["channels"] == ["conda-forge", "nodefaults"]
    assert any(line.startswith("cuda-version=12") for line in environment()[0])


@pytest.mark.parametrize("name", sorted(set(requirements()) - {"cupy-cuda12x"}))
def test_constraints_pin_every_requirement(name):
    pins = dict(line.lower().replace("_", "-").split("==") for line in pinned_lines())
    floor = re.match(r">=([\d.]+)", requirements()[name]).group(1)
    assert numbers(pins[name]) >= numbers(floor)


def pinned_lines():
    """Return the lines of constraints.txt that pin a package."""
    return [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]


def numbers(version):
    """Return a version as a list of integers, so that it compares."""
    return [int(part) for part in re.findall(r"\d+", version)]


def test_nothing_names_a_registry_host_or_a_machine_path():
    hosts = re.compile(r"(index-url|find-links|https?://[^\s]*(pypi|pythonhosted|anaconda))")
    for name in ("constraints.txt", "environment.yml", "pyproject.toml", "Makefile", ".pre-commit-config.yaml"):
        assert not hosts.search((ROOT / name).read_text()), name


def test_one_version():
    version = project()["version"]
    heading = re.search(r"^## (\S+) \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert heading.groups() == (version, str(citation["date-released"])) and citation["version"] == version
