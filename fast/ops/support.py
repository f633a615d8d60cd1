"""Fused Triton kernels. ``import fast`` needs none of them: their modules are imported where they are used."""

import functools
import importlib.util

import torch

LEAST_CAPABILITY = (7, 0)


def interpreted():
    """Whether Triton runs kernels in its interpreter: TRITON_INTERPRET=1 was set when Triton was imported."""
    import triton.language
    from triton.runtime.jit import JITFunction

    return not isinstance(triton.language.sum, JITFunction)


def unavailable(device):
    """Say in one line why the kernels cannot run on tensors of a device, or return None if they can.

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
