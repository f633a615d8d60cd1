"""What the tests of the Triton kernels share: where they run, and compiling them for GPUs that are not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"  # on a CPU in Triton's interpreter
cuda = pytest.mark.skipif(not GPU, reason="no GPU")


def compile_kernel(kernel, tensors, constants, capability):
    """Compile a kernel to machine code for an NVIDIA GPU of a capability such as 90, without one.

    Arguments are pointers if in ``tensors`` (name: "*fp32", ...), constants if in ``constants``, else integers.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else tensors.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


def run_without_interpreter(code):
    """Run code in a process of its own, where kernels are compiled; return what it printed."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
