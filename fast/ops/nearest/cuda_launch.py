"""Compile the CUDA sources of this folder through CuPy and launch their kernels."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..support import first_line

THREADS = 128  # a block
MOST_THREADS = 2**31 - 1  # a launch
_functions = {}  # (source, kernel, constants, device index): the compiled kernel


def source_text(source):
    """Return the text of a CUDA source of this folder, named without its ending."""
    return (Path(__file__).parent / f"{source}.cu").read_text(encoding="utf-8")


def compiled(source, kernel, constants, index):
    """Return a kernel, compiled for a device the first time.

    Parameters
    ----------
    source, kernel : str
        Name of the ``.cu`` file, and of a function in it.
    constants : tuple of (str, int)
        What the compiler is to define.
    index : int
        Number of the device.

    Raises
    ------
    RuntimeError
        A source that does not compile, or a first use while a CUDA graph is captured.
    """
    key = (source, kernel, constants, index)
    if key not in _functions:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"kernel {kernel} is not compiled yet, and cannot be while a CUDA graph is captured: "
                "run once before, or call fast.ops.nearest.cuda.warm()"
            )
        _functions[key] = _compile(*key)
    return _functions[key]


def _compile(source, kernel, constants, index):
    import cupy

    options = tuple(f"-D{name}={value}" for name, value in constants)
    try:
        with cupy.cuda.Device(index):
            return cupy.RawModule(code=source_text(source), options=options).get_function(kernel)
    except Exception as error:
        raise RuntimeError(f"{source}.cu does not compile: {type(error).__name__}: {first_line(error)}") from error


def launch(source, kernel, threads, arguments, constants=()):
    """Run a kernel on torch's current stream.

    Parameters
    ----------
    source, kernel, constants
        As ``compiled`` says.
    threads : int
        At least 1; the kernel's own check stops those of the last block that are too many.
    arguments : sequence of tensor and int
        Contiguous tensors of one device, the first argument among them. An int is passed as int64.

    Raises
    ------
    ValueError
        More threads than a launch can have.
    RuntimeError
        As ``compiled`` says.
    """
    check_threads(threads)
    import cupy

    device = arguments[0].device
    function = compiled(source, kernel, constants, device.index)
    values = tuple(np.int64(a.data_ptr() if isinstance(a, Tensor) else a) for a in arguments)
    with torch.cuda.device(device), cupy.cuda.Device(device.index), _torch_stream(cupy, device):
        function((-(-threads // THREADS),), (THREADS,), values)


def check_threads(threads):
    """Refuse more threads than a launch can have: ValueError."""
    if threads > MOST_THREADS:
        raise ValueError(f"{threads} tokens in one batch are more than the {MOST_THREADS} of a launch; split the batch")


def _torch_stream(cupy, device):
    stream = torch.cuda.current_stream(device)
    if hasattr(cupy.cuda.Stream, "from_external") and hasattr(stream, "__cuda_stream__"):
        return cupy.cuda.Stream.from_external(stream)
    return cupy.cuda.ExternalStream(stream.cuda_stream, device.index)  # CuPy before 14
