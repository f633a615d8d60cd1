"""What the kernels of each kind need, and in one line why it is not there."""

import functools
import importlib.util
import warnings

import torch

LEAST_CAPABILITY = (7, 0)  # of a GPU for Triton's kernels


def unavailable(kind, device, interpreter=False):
    """Return, in one line, why kernels of a kind cannot run on tensors of a device, or None if they can.

    Parameters
    ----------
    kind : {"cuda", "triton", "cpu", "onednn"}
    device : torch.device
    interpreter : bool
        Whether Triton's interpreter (TRITON_INTERPRET=1) may stand for a GPU: slow, for tests.
    """
    if kind == "cpu":
        from . import native

        return f"needs a CPU, not {device.type}" if device.type != "cpu" else native.unavailable()
    if kind == "onednn":
        return f"needs a CPU, not {device.type}" if device.type != "cpu" else onednn_unavailable()
    if kind == "triton":
        if device.type != "cuda" and not interpreter:
            return f"needs a CUDA device, not {device.type}"
        return triton_unavailable(device)
    return cuda_unavailable() if device.type == "cuda" else f"needs a CUDA device, not {device.type}"


@functools.cache
def onednn_unavailable():
    """Return why oneDNN would not multiply faster than PyTorch's own library, in one line, or None if it would."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this PyTorch has no oneDNN"
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "faster with AVX-512 alone, which this processor has not"
    if "GenuineIntel" in _vendor():
        return "MKL, which PyTorch takes, is as fast on Intel's processors"
    return None


def _vendor():
    """Return what the processor calls its maker, as Linux says it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line for line in file if line.startswith("vendor_id")), "")
    except OSError:
        return "GenuineIntel"  # not known: nothing changes


def first_line(error):
    """Return the first line of a message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "no message"


def interpreted():
    """Whether Triton runs kernels in its interpreter: TRITON_INTERPRET=1 was set when Triton was imported."""
    import triton.language
    from triton.runtime.jit import JITFunction

    return not isinstance(triton.language.sum, JITFunction)


def triton_unavailable(device):
    """Return, in one line, why Triton's kernels cannot run on tensors of a device, or None if they can.

    Parameters
    ----------
    device : torch.device or str
        A CUDA device; with TRITON_INTERPRET=1 (slow, for tests) the CPU as well.
    """
    device = torch.device(device)
    reason = _no_triton()
    if reason:
        return reason
    if interpreted():
        return None if device.type in ("cpu", "cuda") else f"Triton's interpreter takes no tensors on {device.type}"
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type} (TRITON_INTERPRET=1 interprets the kernels, slowly)"
    if torch.version.cuda is None:
        return "needs a PyTorch built for CUDA"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device or driver"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return "needs a GPU of compute capability {}.{} or more, not {}.{}".format(*LEAST_CAPABILITY, *capability)
    return None


@functools.cache
def _no_triton():
    """Why Triton cannot be imported, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken installation may raise anything
        return f"Triton cannot be imported: {type(error).__name__}: {' '.join(str(error).split())}"
    return None


@functools.cache
def cuda_unavailable():
    """Return in one line why CUDA kernels cannot be launched through CuPy and what to do, or None if they can."""
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
