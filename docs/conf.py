"""Configuration of the site (Sphinx): documents where they are, docstrings, notebooks with their stored outputs.

The source folder is the repository, so that links between README, notebooks and pages are those that GitHub follows.
"""

import re
import shutil
import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.ext import autosummary
from sphinx.util import logging

autosummary.WELL_KNOWN_ABBREVIATIONS += ("sec.", "Eq.", "eq.", "Fig.", "ref.")  # no ends of a summary

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

project = "AutoFocusFormer"
author = "the authors of the project"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "README"
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/*.md", "docs/api/*", "notebooks/*.*"]
include_patterns += [f"{folder}/*.md" for folder in ("reference", "benchmarks", "fast/weights")]
exclude_patterns = [".*", "build", "outputs"]
highlight_language = "text"

nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"  # outputs hold tables
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

autodoc_mock_imports = ["cupy"]
autodoc_inherit_docstrings = False
autodoc_default_options = {"members": True, "show-inheritance": True, "member-order": "bysource"}
autodoc_default_options |= {"ignore-module-all": True}  # each name where it is defined, once
napoleon_google_docstring = False
napoleon_use_param = napoleon_use_rtype = False  # types are prose: nothing to link

html_math_renderer = "mathml"
html_theme = "furo"
html_title = project
html_static_path = html_css_files = ["site.css"]
html_show_copyright = False

CARDS = "\n".join(
    f"{path.stem} <fast/weights/{path.stem}>"
    for path in sorted(ROOT.glob("fast/weights/*.md"))
    if path.stem != "README"
)
ABLATIONS = "\n".join(
    f"Ablation of {path.stem.removeprefix('ablation_').replace('_', ' ')} <benchmarks/{path.stem}>"
    for path in sorted(ROOT.glob("benchmarks/ablation_*.md"))
)
# Pages that have no table of contents of their own where they are read elsewhere.
CONTENTS = {
    "README": """
```{toctree}
:hidden:
:caption: Learn

Notebooks <notebooks/README>
The definition, in order <reference/README>
```
```{toctree}
:hidden:
:caption: Use

docs/api
fast/weights/README
"""
    + CARDS
    + """
```
```{toctree}
:hidden:
:caption: Evidence

docs/evidence
benchmarks/README
"""
    + ABLATIONS
    + """
docs/LOG
```
```{toctree}
:hidden:
:caption: Project

CONTRIBUTING
CHANGELOG
```
""",
    "notebooks/README": """
```{toctree}
:hidden:
:glob:

[0-9]*
```
""",
}


def append_contents(app, docname, source):
    """Append a page's table of contents to what is read of it."""
    source[0] += CONTENTS.get(docname, "")


def mark_literal(app, what, name, obj, options, lines):
    """Mark an indented block after a paragraph, as docstrings have them, for reStructuredText to keep as it is."""
    for number in reversed(range(len(lines) - 2)):
        line, blank, block = lines[number : number + 3]
        if line.strip() and not blank.strip() and indentation(block) > indentation(line):
            lines[number + 1 : number + 1] = ["", " " * indentation(line) + "::"]
    if what in ("attribute", "data", "property") and lines:
        lines[0] = ": " + lines[0]  # no type first: napoleon would take what is before the first colon for one


def indentation(line):
    """Return the number of a line's leading spaces."""
    return len(line) - len(line.lstrip())


def known_commands(formula):
    r"""Replace what docutils does not know: \big and \Big, \tag, a superscript of nothing."""
    formula = re.sub(r"\\(big|Big)(?=[()])", r"\\\1l", formula)
    formula = re.sub(r"\\tag\{(\w+)\}", r"\\qquad(\1)", formula)
    return "{}" + formula if formula.startswith("^") else formula


def visit_math(translator, node):
    """Write a formula as MathML, which browsers draw by themselves: nothing is loaded from a network."""
    block = node.tagname == "math_block"
    try:
        element = latex2mathml.tex2mathml(known_commands(node.astext()), as_block=block)
    except MathError as error:
        logging.getLogger(__name__).warning("%s in %s", error, node.astext(), location=node)
        element = translator.encode(node.astext())
    element = re.sub(r"<mo>([{}])</mo>", r'<mo stretchy="false">\1</mo>', element)
    translator.body.append(f'<div class="math">{element}</div>' if block else element)
    raise nodes.SkipNode


def write_index(app, exception):
    """Let the start page have the name that servers look for."""
    if exception is None and app.builder.name == "html":
        shutil.copy(Path(app.outdir, "README.html"), Path(app.outdir, "index.html"))


def setup(app):
    app.connect("source-read", append_contents)
    app.connect("autodoc-process-docstring", mark_literal, priority=400)  # before napoleon
    app.connect("build-finished", write_index)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
