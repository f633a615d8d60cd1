"""The folders of train/ import one way, as CONTRIBUTING states; no file of it or of benchmarks/ imports in a circle."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "train").rglob("*.py")}
BENCHMARKS = {f"benchmarks.{path.stem}": path for path in (ROOT / "benchmarks").glob("*.py")}
COMMANDS = "commands"


def order():
    """Return the folders of CONTRIBUTING's table of train/, lowest first; the commands on top come last."""
    return re.findall(r"^\| `train/(\w+)/` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE) + [COMMANDS]


def folder(name):
    """Return the folder of train.FOLDER.FILE, or COMMANDS of train.FILE."""
    parts = name.split(".")
    return parts[1] if len(parts) > 2 else COMMANDS


def imports(name, text, files=FILES):
    """Return which of ``files``, by default those of train/, a file's text imports, anywhere in it."""
    package, found = name.split(".")[:-1], set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join(parts + ([node.module] if node.module else []))
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return {other for other in found if other in files and other != name and not other.endswith("__init__")}


def wrong(name, text):
    """Return what a file imports that it must not: of a later folder, or another command."""
    known, own = order(), folder(name)
    return {
        other
        for other in imports(name, text)
        if known.index(folder(other)) > known.index(own) or folder(other) == own == COMMANDS
    }


def test_every_folder_is_in_the_table():
    assert sorted(order()) == sorted({folder(name) for name in FILES})


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_go_one_way(name):
    assert not wrong(name, FILES[name].read_text())


def test_no_circle():
    files = FILES | BENCHMARKS
    graph = {name: imports(name, path.read_text(), files) for name, path in files.items()}
    order = list(TopologicalSorter(graph).static_order())
    assert order.index("train.common.errors") < order.index("train.engine.loop")
    with pytest.raises(CycleError):
        list(TopologicalSorter(graph | {"train.common.errors": {"train.engine.loop"}}).static_order())


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("train.data.coco", "from ..engine.loop import train", {"train.engine.loop"}),
        ("train.data.coco", "def f():\n    from ..engine import loop", {"train.engine.loop"}),
        ("train.data.coco", "import train.tasks.task", {"train.tasks.task"}),
        ("train.tasks.task", "if TYPE_CHECKING:\n    from train.engine.run import Run", {"train.engine.run"}),
        ("train.show", "from .evaluate import main", {"train.evaluate"}),
        ("train.engine.loop", "from ..data import coco\nfrom .run import Run", set()),
    ],
)
def test_arrows_up_are_found(name, text, expected):
    assert wrong(name, text) == expected
