"""The CUDA sources on a CPU: compiled as plain C++, launched in place of ``fast.ops.nearest.cuda_launch.launch``."""

import ctypes
import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import torch

from fast.ops.nearest import cuda_launch as kernels

SHIM = Path(__file__).parent / "cuda_shim.h"
COMPILER = shutil.which("g++") or shutil.which("clang++")
FLAGS = ["-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-Wno-unknown-pragmas", "-Wno-unused-function"]


class Kernels:
    """Compiles a source the first time that one of its kernels is launched, into a folder."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.library = lru_cache(maxsize=None)(self._library)

    def _library(self, source, constants):
        text = kernels.source_text(source)
        names = re.findall(r"__global__ void (\w+)", text)
        entries = "".join(
            f'extern "C" void launch_{name}(unsigned blocks, unsigned threads, void **arguments) '
            f"{{ launch({name}, blocks, threads, arguments); }}\n"
            for name in names
        )
        stem = self.folder / "_".join([source, *(f"{name}{value}" for name, value in constants)])
        stem.with_suffix(".cpp").write_text(f'#include "{SHIM}"\n{text}\n{entries}')
        defines = [f"-D{name}={value}" for name, value in constants]
        command = [COMPILER, *FLAGS, *defines, str(stem.with_suffix(".cpp")), "-o", str(stem.with_suffix(".so"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(stem.with_suffix(".so")))

    def launch(self, source, kernel, threads, arguments, constants=()):
        """Stand for ``fast.ops.nearest.cuda_launch.launch``: the same arguments, on CPU tensors."""
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        assert all(t.is_contiguous() and t.device.type == "cpu" and t.numel() for t in tensors)
        values = [ctypes.c_int64(a.data_ptr() if isinstance(a, torch.Tensor) else a) for a in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        function = getattr(self.library(source, tuple(constants)), f"launch_{kernel}")
        function(-(-threads // kernels.THREADS), kernels.THREADS, pointers)
