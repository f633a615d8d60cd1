"""Every public function and class of the definition names its source: equation, section, figure, table or reference."""

import ast
import re
from pathlib import Path

REFERENCE = Path(__file__).parent.parent / "reference"
SOURCE = re.compile(r"\b(Eqs?\.|sec\.|Fig\.|Table|ref\.) \[?\d|\beq\. \d|\bappendix\b", re.IGNORECASE)
WITHOUT = {"__init__.py", "checks.py", "layers.py"}  # arguments' checks; textbook functions, whose formula is the text


def test_functions_of_the_definition_name_their_source():
    missing = []
    for path in sorted(REFERENCE.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith(("_", "check_"))
            if path.name not in WITHOUT and public and not SOURCE.search(ast.get_docstring(node) or ""):
                missing.append(f"{path.stem}.{node.name}")
    assert not missing
