"""A wheel is one package, ``autofocusformer``, with all files, that works where no checkout is."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("fast", "reference", "train")
TOP_LEVEL = re.compile(
    r"^\s*(from (fast|reference|train)[\w.]* import |import (fast|reference|train)\b)|-m (fast|train)\b", re.MULTILINE
)
USE = """
import sys
from pathlib import Path
import torch
from autofocusformer import fast, reference
from autofocusformer.train import predict
with torch.no_grad():
    print(fast.create_model(pretrained="digits")(torch.zeros(1, 3, 64, 64)).shape)
print(predict.run_command(predict.main, [sys.argv[1], "--pretrained", "digits", "--out", "classes"]))
print(len(list(Path("classes").iterdir())) > 0, {"fast", "reference", "train"} & set(sys.modules))
predict.run_command(predict.main, ["--nonsense"])
sys.path.insert(0, sys.argv[2])
try:
    import fast
except ImportError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return a folder with what a wheel installs."""
    checkout = tmp_path_factory.mktemp("checkout")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, checkout)
    (checkout / "build" / "lib" / "fast").mkdir(parents=True)
    (checkout / "build" / "lib" / "fast" / "old.py").touch()  # as an earlier build leaves it
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=checkout, check=True, capture_output=True, timeout=200)
    (wheel,) = (checkout / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(checkout / "site")
    return checkout / "site"


def test_a_wheel_is_one_package_with_all_files(site):
    assert {path.name.split("-")[0] for path in site.iterdir()} == {"autofocusformer"}
    assert (next(site.glob("*.dist-info")) / "top_level.txt").read_text().split() == ["autofocusformer"]
    package = site / "autofocusformer"
    files = {path.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file()}
    files = {path for path in files if "__pycache__" not in path.parts}
    assert len(files) > 200 and not [path for path in files if not (package / path).is_file()]
    texts = [path for path in package.rglob("*") if path.suffix in {".py", ".md", ".yaml"}]
    assert not [path for path in texts if TOP_LEVEL.search(path.read_text(encoding="utf-8"))]


def test_what_a_wheel_installs_works_and_names_itself(site, tmp_path):
    picture = ROOT / "fast" / "weights" / "nuclei_samples" / "07761fa39f60dc37.png"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-c", USE, picture, ROOT]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=200, text=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "torch.Size([1, 10])" and lines[-3:-1] == ["0", "True set()"], done.stdout + done.stderr
    assert "see python -m autofocusformer.train.predict --help" in done.stderr
    assert lines[-1] == (
        "fast.ops: autofocusformer.fast.ops has made the operators aff::* in this process; import one of the two"
    )
