"""Compile the CPU kernels at first use, keep them in a per-user cache, and call them on tensors' memory."""

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")


class Threads(ctypes.Structure):
    """``struct Threads`` of native.h."""

    _fields_ = (("start", ctypes.c_void_p), ("count", ctypes.c_int64))


def unavailable():
    """Return in one line why compiled kernels cannot run here, or None if they can."""
    return None


@functools.cache
def load(name):
    """Return the library of a kernel source, compiled if the cache does not hold it.

    Parameters
    ----------
    name : str
        Path of a .cpp file, relative to fast/ops, such as "attention/cpu.cpp".
    """
    source, header = (HERE / name).read_bytes(), (HERE / "native.h").read_bytes()
    key = hashlib.sha256(source + header + repr(FLAGS).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("AFF_CACHE", Path.home() / ".cache" / "autofocusformer"))
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name.replace('/', '-')}-{key}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / target.name
            subprocess.run(["g++", *FLAGS, f"-I{HERE}", str(HERE / name), "-o", str(made)], check=True)
            os.replace(made, target)
    return ctypes.CDLL(str(target))


@functools.cache
def _parallel_region():
    """Address of GOMP_parallel in the OpenMP runtime that PyTorch has loaded, or None."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except AttributeError:
        return None


def call(name, function, *arguments):
    """Call a kernel.

    Parameters
    ----------
    name, function : str
        Source file, as for ``load``; function of it, whose first argument is ``const Threads*``. It returns nothing.
    *arguments : tensor, None, int or float
        Contiguous CPU tensors, passed as pointers (None: a null pointer); int64; double.
    """
    threads = Threads(_parallel_region(), torch.get_num_threads())
    getattr(load(name), function)(ctypes.byref(threads), *map(_argument, arguments))


def _argument(value):
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, torch.Tensor):
        assert value.is_contiguous() and value.device.type == "cpu"
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value)
