"""CONTRIBUTING's table of equations names files that are there and that speak of the equation."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAD = "| equation | reference | fast | kernels | test | notebook |"


def rows():
    """Return the rows of the table: lists of cells."""
    lines = (ROOT / "CONTRIBUTING.md").read_text().splitlines()
    start = lines.index(HEAD) + 2
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[start:end]]


def text_of(path):
    """Return the text of a file, or of all Python files of a folder."""
    return "".join(p.read_text() for p in path.glob("*.py")) if path.is_dir() else path.read_text()


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_files_are_there_and_name_the_equation(row):
    where, reference, fast, kernels, *others = row
    assert all((ROOT / path).exists() for path in (reference, fast, *filter(None, [kernels]), *others))
    kind, numbers = (
        ("Eq.", re.findall(r"Eq\. (\d)", where)) if "Eq." in where else ("sec.", [where.removeprefix("sec. ")])
    )
    for path in (reference, fast, *filter(None, [kernels])):
        text = text_of(ROOT / path)
        assert any(re.search(rf"{re.escape(kind)}[ \d.,]*{re.escape(n)}", text) for n in numbers), path


def test_every_equation_of_the_paper_is_in_the_table():
    assert {n for row in rows() for n in re.findall(r"Eq\. (\d)", row[0])} == set("12345")


def test_every_operator_is_in_the_table():
    folders = {f"fast/ops/{p.parent.name}/" for p in (ROOT / "fast" / "ops").glob("*/plain.py")}
    assert folders == {row[3] for row in rows() if row[3]}
