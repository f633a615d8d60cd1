"""Which path each operator takes on a device, and why. ``python -m fast.doctor`` prints it.

Every operator has several paths that compute the same. The first usable one is taken; a kernel that fails is given up
for the rest of the process, with one warning, and the next path is taken. A path can be forced, for tests, benchmarks
and when in doubt: ``AFF_PATHS=attention=gather,merging=gather`` in the environment, or ``with force(attention=...)``.
A forced path that cannot be taken is an error.
"""

import contextlib
import os
import warnings

import torch

VARIABLE = "AFF_PATHS"
PATHS = {  # operator: paths, best first; the last one works everywhere
    "neighbors": ("cuda", "grid", "brute"),
    "attention": ("triton", "clusters", "gather"),
    "merging": ("triton", "gather"),
    "interpolation": ("triton", "gather"),
}
MEANING = {
    "cuda": "CUDA kernels launched through CuPy",
    "grid": "PyTorch, searching a grid of buckets",
    "brute": "PyTorch, comparing all pairs",
    "triton": "fused Triton kernels",
    "clusters": "PyTorch, dense products inside each cluster",
    "gather": "PyTorch, gathering token by token",
}
KERNELS = ("cuda", "triton")  # what may fail on one machine and work on another
_failed = {}  # (operator, path): what went wrong, in one line
_missing = set()  # (operator, path) that a GPU could take if something were installed, once it has been said


def _parse(text):
    """Read "operator=path,..." into a dict; ValueError for what is not known."""
    chosen = dict(part.partition("=")[::2] for part in text.replace(" ", "").split(",") if part)
    _check(chosen)
    return chosen


def _check(chosen):
    for operator, path_name in chosen.items():
        if operator not in PATHS:
            raise ValueError(f"{VARIABLE}: no operator {operator!r}; there are {', '.join(PATHS)}")
        if path_name not in PATHS[operator]:
            raise ValueError(f"{VARIABLE}: {operator} has no path {path_name!r}, only {', '.join(PATHS[operator])}")


_forced = _parse(os.environ.get(VARIABLE, ""))


@contextlib.contextmanager
def force(**paths):
    """Take these paths inside the ``with`` block: ``force(attention="gather")``.

    Raises
    ------
    ValueError
        An operator or a path that does not exist.
    """
    _check(paths)
    before = dict(_forced)
    _forced.update(paths)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def forced(operator):
    """Return the path that is forced, or None."""
    return _forced.get(operator)


def why_not(operator, path_name, device):
    """Return in one line why a path is not taken on a device of itself, or None if it can be.

    The Triton interpreter counts as usable only where the path is forced: it is for tests.
    """
    device = torch.device(device)
    if (operator, path_name) in _failed:
        return _failed[operator, path_name]
    if path_name == "cuda":
        if device.type != "cuda":
            return f"needs a CUDA device, not {device.type}"
        from .nearest import cuda_support

        return cuda_support.unavailable()
    if path_name == "triton":
        if device.type != "cuda" and forced(operator) != "triton":
            return f"needs a CUDA device, not {device.type}"
        from . import support

        return support.unavailable(device)
    return None


@torch.compiler.assume_constant_result
def path(operator, device):
    """Return the path that an operator takes on a device.

    Parameters
    ----------
    operator : str
        A key of ``PATHS``.
    device : torch.device

    Raises
    ------
    RuntimeError
        A forced path that cannot be taken; the message says why.
    """
    if operator in _forced:
        reason = why_not(operator, _forced[operator], device)
        if reason:
            raise RuntimeError(f"{operator}: the forced path {_forced[operator]} cannot be taken: {reason}")
        return _forced[operator]
    for name in PATHS[operator]:
        reason = why_not(operator, name, device)
        if reason is None:
            return name
        _missed(operator, name, reason, device)


def _missed(operator, path_name, reason, device):
    """On a GPU, say once that a faster path cannot be taken."""
    if torch.device(device).type != "cuda" or (operator, path_name) in {*_missing, *_failed}:
        return
    _missing.add((operator, path_name))
    index = PATHS[operator].index(path_name) + 1
    warnings.warn(f"{operator}: no path {path_name}: {reason}; using {PATHS[operator][index]}", stacklevel=4)


def run(operator, device, implementations):
    """Call the implementation of the path that is taken; if a kernel fails, warn once and take the next path.

    Without autocast: an operator sums in float32 or wider whatever its inputs are.

    Parameters
    ----------
    operator : str
    device : torch.device
    implementations : dict of str: callable
        One for each path, without arguments.
    """
    while True:
        name = path(operator, device)
        try:
            with torch.autocast(torch.device(device).type, enabled=False):
                return implementations[name]()
        except (ValueError, TypeError, torch.OutOfMemoryError):  # wrong input, or too much of it, on any path
            raise
        except Exception as error:
            if name not in KERNELS or name == forced(operator):
                raise
            fall_back(operator, name, error)


def fall_back(operator, path_name, error):
    """Give up a path for the rest of the process, and say so once."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = f"failed: {type(error).__name__}: {lines[0] if lines else 'no message'}"
    _failed[operator, path_name] = reason
    index = PATHS[operator].index(path_name) + 1
    warnings.warn(f"{operator}: path {path_name} {reason}; using {PATHS[operator][index]}", stacklevel=3)
