"""Geometry as CUDA kernels, launched through CuPy on torch's stream and in torch's memory.

The sources (``*.cu``) are compiled at run time by NVRTC, so nothing is built beforehand. CuPy is imported when a kernel
is compiled, not before: ``unavailable`` says whether that can work.
"""

import functools
import warnings

import torch


@functools.cache
def unavailable():
    """Return in one line why the CUDA kernels cannot be used here and what to do, or None if they can."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA; install a CUDA build of torch"
    with warnings.catch_warnings(record=True) as caught:  # torch warns of a driver that is too old
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if not usable:
        why = f" ({first_line(caught[0].message)})" if caught else ""
        return f"torch finds no usable NVIDIA GPU{why}; check the driver with nvidia-smi"
    return _cupy_unavailable(torch.version.cuda.split(".")[0])


def _cupy_unavailable(major):
    """The same for CuPy alone, tried out: one for another CUDA than torch's (``major``) works where the driver is new
    enough and CuPy finds its own compiler."""
    theirs, install = "", f"install cupy-cuda{major}x"
    try:
        import cupy

        theirs = f" for CUDA {cupy.cuda.runtime.runtimeGetVersion() // 1000}"
        cupy.RawModule(code='extern "C" __global__ void nothing() {}').get_function("nothing")
    except ModuleNotFoundError as error:
        return f"CuPy is not installed (no module {error.name}); {install}"
    except Exception as error:
        problem = f"{type(error).__name__}: {first_line(error)}"
        return f"CuPy{theirs} does not work beside torch for CUDA {major} ({problem}); {install}, or a newer driver"
    return None


def warm(device="cuda", nearest=(1, 4, 6, 9)):
    """Run every kernel once on a few tokens, for none can be compiled while a CUDA graph is captured.

    Parameters
    ----------
    device : torch.device
    nearest : sequence of int
        The numbers of nearest things that will be asked for; each is a kernel of its own.

    Raises
    ------
    RuntimeError
        A kernel that cannot be compiled.
    """
    from . import cuda as neighbors

    positions = torch.arange(80, device=device).view(1, 40, 2)
    for count in nearest:
        neighbors.nearest_tokens(positions, positions, count)
        neighbors.nearest_tokens(positions.double(), positions, count)
        neighbors.nearest_clusters(positions, positions, torch.ones_like(positions[0, :, 0]), count)
    neighbors.local_stride(positions)


def first_line(error):
    """The first line of a message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "no message"
