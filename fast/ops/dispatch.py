"""Which path each operator takes on a device, and why. ``python -m fast.doctor`` prints it.

Every operator has several paths that compute the same. The choice is made once for each device: the first path whose
requirements are there (``support``) and that runs a tiny case right is taken. A kernel that fails later fails loudly;
its error names the switch to set. A path can be forced, for tests, benchmarks and when in doubt:
``AFF_PATHS=attention=plain,merging=plain`` in the environment, or ``with force(attention=...)``. A forced path that
cannot be taken is an error.
"""

import contextlib
import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch

from . import support

VARIABLE = "AFF_PATHS"
PATHS = {  # operator: paths, best first; the last one works everywhere
    "nearest": ("cuda", "cpu", "grid", "plain"),
    "attention": ("triton", "cpu", "clusters", "plain"),
    "merging": ("triton", "cpu", "plain"),
    "sampling": ("triton", "cpu", "plain"),
    "ordering": ("cpu", "plain"),
    "linear": ("onednn", "plain"),
}
MEANING = {
    "cuda": "CUDA kernels launched through CuPy",
    "triton": "fused Triton kernels",
    "cpu": "compiled C++ kernels",
    "onednn": "products of oneDNN",
    "grid": "PyTorch, searching a grid of buckets",
    "clusters": "PyTorch, dense products inside each cluster",
    "plain": "PyTorch, the definition",
}
ON_CPU = ("cpu", "onednn")
KERNELS = ("cuda", "triton", *ON_CPU)  # what may fail on one machine and work on another: tried on a tiny case
TOLERANCE = 1e-3  # of the largest value, between a path's result of the tiny case and the plain one's

_trials = {}  # operator: function (path, device) -> list of tensors, the tiny case
_chosen = {}  # (operator, device): path
_failed = {}  # (operator, path, device): why the tiny case did not pass


def trial(operator):
    """Register a function as the tiny case of an operator: (path, device) -> list of tensors, by that path."""

    def register(function):
        _trials[operator] = function
        return function

    return register


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
    """Take these paths inside the ``with`` block: ``force(attention="plain")``.

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
    interpreter = forced(operator) == "triton"
    reason = support.unavailable(path_name, device, interpreter) if path_name in KERNELS else None
    return reason or _failed.get((operator, path_name, str(device)))


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
    key = (operator, str(device))
    if key not in _chosen:
        _chosen[key] = _with_real_tensors(_choose, operator, torch.device(device))
    return _chosen[key]


def _with_real_tensors(function, *arguments):
    """Call a function; while a model is exported in a thread of its own, where tensors are not traced."""
    if not torch.compiler.is_exporting():
        return function(*arguments)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *arguments).result()


def _choose(operator, device):
    """The first path that can be taken; on a GPU, say once if it is not the fastest; without numbers, the plain one."""
    if device.type == "meta":
        return PATHS[operator][-1]
    for name in PATHS[operator]:
        if why_not(operator, name, device) is None and _passes(operator, name, device):
            break
    fastest = next(path_name for path_name in PATHS[operator] if path_name not in ON_CPU)
    if device.type == "cuda" and name != fastest:
        warnings.warn(
            f"{operator}: no path {fastest}: {why_not(operator, fastest, device)}; using {name}", stacklevel=5
        )
    return name


def _passes(operator, path_name, device):
    """Whether a path computes the tiny case as plain PyTorch does; if not, the reason is kept for ``why_not``."""
    if path_name not in KERNELS:
        return True
    reason = None
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            found, expected = (_trials[operator](name, device) for name in (path_name, PATHS[operator][-1]))
        if not all(map(_close, found, expected)):
            reason = "computes a tiny case wrong"
    except Exception as error:  # whatever a compiler or driver raises
        reason = f"fails on a tiny case: {type(error).__name__}: {support.first_line(error)}"
    if reason:
        _failed[operator, path_name, str(device)] = reason
    return reason is None


def _close(found, expected):
    if not found.is_floating_point():
        return torch.equal(found, expected)
    return bool((found - expected).abs().amax() <= TOLERANCE * expected.abs().amax())


def run(operator, path_name, function, *arguments):
    """Call a kernel, without autocast: it sums in float32 or wider whatever its inputs are.

    Raises
    ------
    ValueError, TypeError, torch.OutOfMemoryError
        The kernel's own: wrong input, or too much of it.
    RuntimeError
        Any other error of the kernel; the message names the switch that avoids it.
    """
    device = next(x.device for x in arguments if isinstance(x, torch.Tensor))
    try:
        with torch.autocast(device.type, enabled=False):
            return function(*arguments)
    except (ValueError, TypeError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        slower = next(n for n in reversed(PATHS[operator]) if n not in KERNELS)
        raise RuntimeError(
            f"{operator}: path {path_name} failed: {type(error).__name__}: {support.first_line(error)}; "
            f"set {VARIABLE}={operator}={slower} to go without it"
        ) from error
