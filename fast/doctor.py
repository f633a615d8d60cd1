"""Print which path each operator takes on this machine, and why.

    python -m fast.doctor                 # on the GPU if there is one, else on the CPU
    python -m fast.doctor --device cpu
    python -m fast.doctor --check         # also run a small model by every path, and compare

A path is forced for one run by ``AFF_PATHS``, as in ``AFF_PATHS=attention=plain,nearest=plain``.
"""

import argparse
import importlib.metadata
import os
import platform
import sys

import torch

from .models import create_model
from .ops import dispatch, native

TOLERANCE = 1e-4  # of the largest logit; paths differ in the order of float32 sums


def main(arguments=None):
    """Run the command line; returns its exit code: 1 where ``--check`` found paths that differ, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m fast.doctor", description="which path each operator takes, and why"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--check", action="store_true", help="run a small model by every path, and compare")
    options = parser.parse_args(arguments)
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        print(f"error: --device {options.device}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    print("\n".join([*machine(device), "", *explain(device)]))
    return check(device) if options.check else 0


def machine(device):
    """Describe software and device, a line each."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    yield f"device   {device} ({name})"
    packages = ("triton", "cupy-cuda12x", "cupy-cuda13x")
    yield f"versions Python {platform.python_version()}, torch {torch.__version__}, " + ", ".join(
        map(version, packages)
    )
    yield f"threads  {torch.get_num_threads()}, {waiting()}"
    yield from native.describe()
    if os.environ.get(dispatch.VARIABLE):
        yield f"forced   {dispatch.VARIABLE}={os.environ[dispatch.VARIABLE]}"


def waiting():
    """Return how threads wait for one another, and what to set where they stall beside other work."""
    policy = [f"{name}={os.environ[name]}" for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ]
    if policy:
        return f"waiting by {', '.join(policy)}"
    return "waiting by spinning, which stalls them beside other work: set GOMP_SPINCOUNT=100 before Python starts"


def version(package):
    """Return "package 1.2.3", or "no package"."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {package}"


def explain(device):
    """Return for each operator which path it takes, and of every other one why not, a line each."""
    for operator, paths in dispatch.PATHS.items():
        try:
            taken = dispatch.path(operator, device)
        except RuntimeError as error:
            yield f"{operator}: {error}"
            continue
        yield f"{operator}: {taken} ({dispatch.MEANING[taken]}){', forced' if dispatch.forced(operator) else ''}"
        for other in paths:
            if other != taken:
                yield f"    not {other}: {dispatch.why_not(operator, other, device) or 'a better one is there'}"


def check(device):
    """Run a small model by every usable path of every operator; returns 0 if all agree with the plainest, else 1."""
    torch.manual_seed(0)
    model, images = create_model("aff_nano", num_classes=10).eval().to(device), torch.randn(2, 3, 96, 128).to(device)
    plainest = {operator: paths[-1] for operator, paths in dispatch.PATHS.items()}
    with torch.no_grad(), dispatch.force(**plainest):
        expected = model(images)
    worst = 0
    for operator in ("nearest", "ordering", "attention", "merging"):
        for path in dispatch.PATHS[operator][:-1]:
            if dispatch.why_not(operator, path, device):
                continue
            with torch.no_grad(), dispatch.force(**plainest | {operator: path}):
                error = ((model(images) - expected).abs().max() / expected.abs().max()).item()
            worst = max(worst, error)
            print(f"check    {operator} by {path}: relative difference {error:.1e}")
    print("check    all paths agree" if worst < TOLERANCE else f"check    paths differ by more than {TOLERANCE}")
    return int(not worst < TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
