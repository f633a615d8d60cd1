"""Weights for the tests: the recipe of the golden vectors, and a filler that leaves nothing at 0 or 1.

A gain of 1 or a bias of 0 would hide a bug from any tolerance.
"""

import zlib

import numpy as np
import torch

from fast.checkpoints import official_name

SMALL_PARTS = ("pos_embed.", "weight_net.0", "sampling_offsets")  # of official keys: drawn a tenth as large


def draw(key, shape):
    """Draw one tensor of the golden recipe from its official key, float32."""
    z = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(shape)
    last = key.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        value = np.zeros(shape)
    elif last in ("running_var", "running_mean"):
        value = 1 + 0.1 * abs(z) if last == "running_var" else 0.1 * z
    elif last in ("gamma1", "gamma2"):
        value = 0.5 + 0.1 * z
    elif last in ("blank_k", "blank_v"):
        value = z
    elif last == "shepard_power":
        value = 3 + 0.1 * z
    elif len(shape) >= 2:
        value = z / np.sqrt(np.prod(shape[1:])) * (0.1 if any(part in key for part in SMALL_PARTS) else 1)
    else:
        value = 1 + 0.1 * z if last == "weight" else 0.1 * z
    return value.astype(np.float32)


def golden_weights(model):
    """Return the golden recipe's weights for a model, under our names: a dict of float32 arrays."""
    return {name: draw(official_name(name), tuple(value.shape)) for name, value in model.state_dict().items()}


def fill(module, seed=0, dtype=torch.float32):
    """Fill a module with non-trivial random weights rounded to ``dtype`` and return them.

    Matrices keep their outputs near the size of their inputs (those that read positions in cells: a tenth of it); gains
    and scales are 1 +- 0.3; biases and blank tokens 0.3 wide; running variances above 0.5; half the Shepard power 3 and
    temperatures 0.1, each within a tenth or so.

    Returns
    -------
    dict of str to float64 array
        For the reference: the very values that the module now has.
    """
    state = {}
    for name, value in module.state_dict().items():
        z = np.random.default_rng((seed, zlib.crc32(name.encode()))).standard_normal(tuple(value.shape))
        state[name] = torch.as_tensor(_nontrivial(name, z)).to(dtype).to(value.dtype)
    module.load_state_dict(state)
    return {name: value.double().numpy() for name, value in state.items()}


def _nontrivial(name, z):
    if name.endswith("running_var"):
        return 0.5 + abs(z)
    if name.endswith(("shepard_power", "temperature")):
        return (3 if name.endswith("shepard_power") else 0.1) * (1 + 0.1 * z)
    if z.ndim >= 2:
        tenth = 0.1 if name.startswith("position.") or ".position." in name or "weight_net.0" in name else 1.0
        return tenth * z / np.sqrt(np.prod(z.shape[1:]))
    is_gain = name.endswith((".weight", "scale1", "scale2")) or name == "weight"
    return 1 + 0.3 * z if is_gain else 0.3 * z


def tensors(weights, dtype, requires_grad=False):
    """Return a dict of arrays as a dict of tensors of ``dtype``."""
    return {name: torch.from_numpy(value).to(dtype).requires_grad_(requires_grad) for name, value in weights.items()}
