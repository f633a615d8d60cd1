"""What a wheel holds: one package, autofocusformer, with the three of this repository inside.

A checkout (and ``pip install -e .``) has ``reference``, ``fast`` and ``train`` at the top, as written. In a user's
site-packages names as common as these would meet others, so that a wheel has ``autofocusformer.reference``,
``autofocusformer.fast`` and ``autofocusformer.train``, and its files name one another so.
"""

import re
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

NAME = "autofocusformer"
PACKAGES = find_packages(include=["reference*", "fast*", "train*"])
DATA = {
    "fast": ["ops/*.h", "ops/*.cpp", "ops/*/*.cpp", "ops/*/*.cu", "weights/*", "weights/*/*"],
    "reference": ["README.md"],
    "train": ["configs/**/*.yaml", "cards/*.yaml"],
}
TEXTS = {".md", ".yaml"}  # data files that name imports and commands
INIT = '"""AutoFocusFormer (CVPR 2023): ``reference`` in NumPy, ``fast`` in PyTorch, and ``train``."""\n'
TOP = r"(fast|reference|train)"


def renamed(source: str) -> str:
    """Return a module's source with its imports of the three packages, and the commands it names, below NAME."""
    source = re.sub(rf"^(\s*(?:>>> )?)from {TOP}\b", rf"\1from {NAME}.\2", source, flags=re.MULTILINE)
    source = re.sub(rf"^(\s*(?:>>> )?)import {TOP}$", rf"\1from {NAME} import \2", source, flags=re.MULTILINE)
    source = re.sub(
        rf"^(\s*(?:>>> )?)import {TOP}(\.[\w.]+)$",
        rf"\1from {NAME} import \2; import {NAME}.\2\3",
        source,
        flags=re.MULTILINE,
    )
    return re.sub(rf"-m (?={TOP}\.|\{{)", f"-m {NAME}.", source)


class RenamedBuild(build_py):
    """Copy modules and texts, renamed, and make the package that holds them."""

    def run(self):
        """Copy everything, and nothing that an earlier build has left: all of ``build_lib`` goes into the wheel."""
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        package = Path(self.build_lib, NAME)
        (package / "__init__.py").write_text(INIT, encoding="utf-8")
        for path in package.rglob("*"):
            if path.suffix in TEXTS:
                path.write_text(renamed(path.read_text(encoding="utf-8")), encoding="utf-8")

    def build_module(self, module, module_file, package):
        """Copy one module."""
        target, copied = super().build_module(module, module_file, package)
        path = Path(target)
        path.write_text(renamed(path.read_text(encoding="utf-8")), encoding="utf-8")
        return target, copied


if "editable_wheel" in sys.argv:
    setup(packages=PACKAGES, package_data=DATA)
else:
    setup(
        packages=[f"{NAME}.{package}" for package in PACKAGES],
        package_dir={f"{NAME}.{package}": package for package in ("reference", "fast", "train")},
        package_data={f"{NAME}.{package}": patterns for package, patterns in DATA.items()},
        cmdclass={"build_py": RenamedBuild},
    )
