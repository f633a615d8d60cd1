"""Around the CUDA kernels: what says that they cannot be used, compiling them, launching them on torch's stream."""

import shutil
import subprocess
import sys
import types
import warnings
from contextlib import nullcontext
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from fast.ops import support
from fast.ops.nearest import cuda
from fast.ops.nearest import cuda_launch as kernels
from parity_tests.test_mirror import ROOT, run_python

SOURCES = sorted(path.stem for path in (ROOT / "fast" / "ops" / "nearest").glob("*.cu"))


def no_problem(*_):
    return 0


def raising(error):
    def function(*_, **__):
        raise error

    return function


def pretended_cupy(monkeypatch, version=13020, compiler=no_problem, **more):
    """Put a CuPy of that CUDA version in the place of the real one."""
    cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(runtimeGetVersion=lambda: version), **more)
    module = types.SimpleNamespace(get_function=compiler)
    cupy = types.SimpleNamespace(__version__="14.0", cuda=cuda, RawModule=lambda code: module)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    return cupy


def unavailable(monkeypatch, cuda="13.2", gpu=True):
    """Ask on a torch of that CUDA version, with or without a GPU."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    return support.cuda_unavailable.__wrapped__()


def test_unavailable_says_what_is_wrong_with_torch(monkeypatch):
    pretended_cupy(monkeypatch)
    assert unavailable(monkeypatch, cuda=None) == "this torch is built without CUDA; install a CUDA build of torch"
    assert unavailable(monkeypatch, gpu=False) == "torch finds no usable NVIDIA GPU; check the driver with nvidia-smi"
    assert unavailable(monkeypatch) is None


def test_unavailable_passes_on_what_torch_warns_of(monkeypatch):
    def old_driver():
        warnings.warn("The NVIDIA driver on your system is too old\nmore", stacklevel=1)
        return False

    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.cuda, "is_available", old_driver)
    assert "(The NVIDIA driver on your system is too old); check" in support.cuda_unavailable.__wrapped__()


def test_unavailable_says_what_is_wrong_with_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert unavailable(monkeypatch) == "CuPy is not installed (no module cupy); install cupy-cuda13x"
    pretended_cupy(monkeypatch, 12090, raising(RuntimeError("cudaErrorInsufficientDriver: too old\nmore")))
    assert unavailable(monkeypatch) == (
        "CuPy for CUDA 12 does not work beside torch for CUDA 13 "
        "(RuntimeError: cudaErrorInsufficientDriver: too old); install cupy-cuda13x, or a newer driver"
    )
    pretended_cupy(monkeypatch, 12090, lambda name: None)
    assert unavailable(monkeypatch) is None


def test_everything_imports_without_cupy():
    code = "import fast.ops.nearest.cuda; from fast.ops import support as s; print(type(s.cuda_unavailable()))"
    assert run_python(code, ["cupy"], ROOT) in ("<class 'str'>\n", "<class 'NoneType'>\n")


class Recorder:
    """A pretended CuPy module and kernel, which remember what they were asked."""

    def __init__(self, **arguments):
        self.arguments, self.launched = arguments, []

    def get_function(self, name):
        self.name = name
        return lambda *launch: self.launched.append(launch)


def pretended_gpu(monkeypatch, stream, **arguments):
    """Let launches on CPU tensors reach a pretended CuPy; return it, and a list of what was entered."""
    entered = []
    cupy = pretended_cupy(
        monkeypatch,
        Device=lambda index: nullcontext(entered.append(("device", index))),
        ExternalStream=lambda pointer, index: nullcontext(entered.append(("stream", pointer, index))),
        Stream=types.SimpleNamespace(),
    )
    monkeypatch.setattr(kernels, "_functions", {})
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(entered.append(("torch", device))))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=stream))
    return cupy, entered


def test_launch_passes_pointers_and_sizes_on_the_stream_of_torch(monkeypatch):
    made = []
    cupy, entered = pretended_gpu(monkeypatch, stream=77)
    cupy.RawModule = lambda **arguments: made.append(Recorder(**arguments)) or made[-1]
    tensor = torch.arange(3)
    for _ in range(2):
        kernels.launch("neighbors", "local_stride", 129, (tensor, 5), (("NEAREST", 4),))
    assert len(made) == 1 and made[0].name == "local_stride"  # compiled once
    assert made[0].arguments == {"code": kernels.source_text("neighbors"), "options": ("-DNEAREST=4",)}
    grid, block, values = made[0].launched[1]
    assert (grid, block, values) == ((2,), (128,), (tensor.data_ptr(), 5))
    assert all(type(value) is np.int64 for value in values)
    assert entered[-3:] == [("torch", tensor.device), ("device", None), ("stream", 77, None)]


def test_newer_cupy_takes_the_stream_object(monkeypatch):
    stream = type("Stream", (), {"__cuda_stream__": no_problem})
    cupy = pretended_cupy(monkeypatch, Stream=types.SimpleNamespace(from_external=lambda s: [s]))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    assert kernels._torch_stream(cupy, torch.device("cpu")) == [stream]


def test_source_that_does_not_compile_is_one_line(monkeypatch):
    cupy = pretended_cupy(monkeypatch, Device=lambda index: nullcontext())
    cupy.RawModule = raising(Exception("\nneighbors.cu(3): error: expected a ;\n1 error detected"))
    with pytest.raises(RuntimeError) as error:
        kernels.compiled("neighbors", "local_stride", (("NEAREST", 77),), 0)
    assert str(error.value) == "neighbors.cu does not compile: Exception: neighbors.cu(3): error: expected a ;"


def test_first_use_during_graph_capture_is_refused_and_warm_prevents_it(monkeypatch):
    cupy, _ = pretended_gpu(monkeypatch, stream=0)
    cupy.RawModule = Recorder
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"run once before, or call fast.ops.nearest.cuda.warm\(\)"):
        cuda.warm("cpu", nearest=(4,))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    cuda.warm("cpu", nearest=(4, 6))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    cuda.warm("cpu", nearest=(6, 4))
    found = {(source, kernel) for source, kernel, _, _ in kernels._functions}
    assert {name for _, name in found} == {"nearest_whole", "nearest_real", "local_stride"}


@pytest.mark.parametrize("arch", ["compute_80", "compute_90"])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.skipif(find_spec("cuda") is None or find_spec("cuda.bindings") is None, reason="no cuda-bindings")
def test_nvrtc_compiles_every_source(source, arch):
    from cuda.bindings import nvrtc

    try:
        nvrtc.nvrtcVersion()
    except RuntimeError as error:
        pytest.skip(f"no NVRTC: {error}")
    code = kernels.source_text(source).encode()
    for nearest in (1, 6, 32):
        program = nvrtc.nvrtcCreateProgram(code, f"{source}.cu".encode(), 0, [], [])[1]
        options = [f"-arch={arch}".encode(), f"-DNEAREST={nearest}".encode()]
        result = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
        log = bytes(bytearray(nvrtc.nvrtcGetProgramLogSize(program)[1] + 1))  # written to: one byte would be shared
        nvrtc.nvrtcGetProgramLog(program, log)
        assert result == nvrtc.nvrtcResult.NVRTC_SUCCESS and not log.strip(b" \0\n"), log
        ptx = bytes(bytearray(nvrtc.nvrtcGetPTXSize(program)[1] + 1))
        nvrtc.nvrtcGetPTX(program, ptx)
        assert b".visible .entry" in ptx and b"fma.rn.f64" not in ptx


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_nvcc_compiles_every_source(source, arch, tmp_path):
    out = tmp_path / f"{source}.ptx"
    path = ROOT / "fast" / "ops" / "nearest" / f"{source}.cu"
    command = ["nvcc", "-ptx", f"-arch={arch}", "-DNEAREST=6", "-Werror=all-warnings", str(path), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ".visible .entry" in out.read_text()
