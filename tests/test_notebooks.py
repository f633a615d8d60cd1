"""The notebooks as they are committed: small, executed, without errors or traces of a machine, listed in the index.

That they run is checked by nbval (``make test-notebooks``).
"""

import re
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 2 * 2**20  # bytes
PATHS = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|usr|opt|mnt|Users|content)/|[A-Z]:\\\\|site-packages")
HEADINGS = ("**What you will see", "**What you need", "## Exercises", "<details>", "README.md#glossary")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    """Every notebook, with its path in ``.path``."""
    content = nbformat.read(request.param, as_version=4)
    content.path = request.param
    return content


def code_cells(notebook):
    """Return the cells of code that are not empty."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def prose(notebook):
    """Return all Markdown of a notebook as one string."""
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def test_there_are_notebooks_numbered_without_gaps():
    assert [path.name[:3] for path in NOTEBOOKS] == [f"{number:02}_" for number in range(len(NOTEBOOKS))]
    assert NOTEBOOKS


def test_notebook_is_valid_and_small(notebook):
    nbformat.validate({key: value for key, value in notebook.items() if key != "path"})
    assert notebook.path.stat().st_size < LARGEST


def test_notebook_was_run_from_top_to_bottom_without_errors(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_notebook_names_no_path_of_a_machine(notebook):
    text = [cell.source for cell in notebook.cells]
    for cell in code_cells(notebook):
        for output in cell.outputs:
            text.append(output.get("text", ""))
            text += [str(value) for kind, value in output.get("data", {}).items() if not kind.startswith("image/")]
    found = PATHS.search("\n".join(text))
    assert found is None, found


def test_notebook_metadata_is_what_a_reader_needs(notebook):
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)


def test_notebook_stores_no_widget_without_its_kernel(notebook):
    kinds = {kind for cell in code_cells(notebook) for output in cell.outputs for kind in output.get("data", {})}
    assert not [kind for kind in kinds if "widget" in kind]


def test_notebook_says_what_it_shows_and_ends_with_exercises(notebook):
    text = prose(notebook)
    assert text.startswith(f"# {notebook.path.name[:2]} · ")
    assert not [heading for heading in HEADINGS if heading not in text]
    assert text.count("<details>") == text.count("</details>") == text.count("<summary>") >= 2


def test_notebook_asserts_its_numbers(notebook):
    assert sum(cell.source.count("assert") for cell in code_cells(notebook)) >= 3


def test_links_of_a_notebook_lead_somewhere(notebook):
    for target in re.findall(r"\]\(([^)#]+)", prose(notebook)):
        assert target.startswith("http") or (FOLDER / target).exists(), target


def test_index_lists_every_notebook_with_its_picture():
    index = (FOLDER / "README.md").read_text()
    for path in NOTEBOOKS:
        number = path.name[:2]
        assert f"({path.name})" in index and f"thumbnails/{number}.png" in index, path.name
        assert 0 < (FOLDER / "thumbnails" / f"{number}.png").stat().st_size < 100_000
    for target in re.findall(r"\]\(([^)#]+)", index):
        assert target.startswith("http") or (FOLDER / target).exists(), target
