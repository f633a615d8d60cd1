"""Gradients: fast's backward pass against central differences of the float64 reference, and element by element."""

import zlib

import numpy as np
import torch

from parity_tests.compare import FLOOR, GRADIENT, TABLE

STEP = 4e-6  # small: a layer norm over four slot weights bends within a thousandth
DIRECTIONS = 4


def backward(module, inputs, function, grad_out):
    """Run ``function(inputs)`` backward from ``grad_out``; return the gradients of the inputs and of all parameters."""
    inputs = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    module.zero_grad()
    function(inputs).backward(grad_out)
    return {name: value.grad for name, value in (*inputs.items(), *module.named_parameters())}


def flat(inputs, function, grad_out, dtype):
    """Return the gradients of ``function`` of a dict of tensors, computed in ``dtype``, as a dict of float64 arrays."""
    inputs = {name: value.detach().to(dtype).requires_grad_() for name, value in inputs.items()}
    function(inputs).backward(grad_out.to(dtype))
    return {name: value.grad.double().numpy() for name, value in inputs.items() if value.grad is not None}


def assert_directional(gradients, output, inputs, grad_out, *, name, table=TABLE):
    """Compare gradients with central differences of the reference along random directions, one input at a time.

    The oracle extrapolates the differences of steps h and 2 h to step 0 (Richardson); what step h itself is off by
    is the baseline's error. The floor is the rounding of the output, over h.

    Parameters
    ----------
    gradients : dict of str to tensor
        fast's, of the scalar ``sum(output * grad_out)``.
    output : callable
        The reference: dict of float64 arrays -> array.
    inputs : dict of str to array
        Where to differentiate; those without a gradient are held fixed.
    grad_out : array
    """
    noise = FLOOR * np.finfo(np.float64).eps * np.abs(output(inputs) * grad_out).sum() / STEP
    for key, gradient in gradients.items():
        for number in range(DIRECTIONS):
            direction = np.random.default_rng((number, zlib.crc32(key.encode()))).standard_normal(inputs[key].shape)
            near, far = (
                _difference(output, inputs, key, step * direction, grad_out) / step for step in (STEP, 2 * STEP)
            )
            terms = gradient.cpu().double().numpy() * direction
            _check(near, far, terms, noise, table.row(name + " (differences)", gradient), f"{name}: {key}")


def _difference(output, inputs, key, step, grad_out):
    ends = [output({**inputs, key: inputs[key] + sign * step}) for sign in (1, -1)]
    return ((ends[0] - ends[1]) * grad_out).sum() / 2


def _check(near, far, terms, noise, row, name):
    oracle = (4 * near - far) / 3
    if abs(near - oracle) > 1e-4 * np.abs(terms).sum() + noise:
        raise ValueError(f"{name}: differences of steps h and 2 h disagree ({near:.6g}, {far:.6g}) and prove nothing")
    error, allowed = abs(terms.sum() - oracle), GRADIENT * abs(near - oracle) + noise
    row.cases, row.worst = row.cases + 1, max(row.worst or 0.0, error / allowed)
    if not error <= allowed:
        raise AssertionError(f"{name}: off by {error:.3g} of {oracle:.6g} along a direction, allowed {allowed:.3g}")


def assert_gradcheck(function, *inputs):
    """Run ``torch.autograd.gradcheck`` in float64 on inputs that all require a gradient."""
    assert torch.autograd.gradcheck(function, [value.detach().double().requires_grad_() for value in inputs])
