"""Products of matrices in float32 on a CPU, by the faster of the libraries that PyTorch has.

PyTorch multiplies float32 matrices with MKL, which uses AVX-512 on Intel's processors alone. oneDNN, which PyTorch has
as well, uses it on all, and is twice as fast on the others: there ``onednn`` is the path. Where no gradient is wanted
it applies the activation and the sum in the same go.
"""

import math

import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import flop_registry, register_flop_formula

from . import dispatch
from .indexing import has_hooks

LEAST = 2**20  # multiply-adds from which on oneDNN pays: below, starting it takes longer
LEAST_SIDE = 32  # of a weight, from which on its gradient is oneDNN's, too


def apply_linear(layer, x, activation=None, add=None):
    """Apply a linear layer: ``activation(layer(x)) + add``, by the faster path.

    Parameters
    ----------
    layer : nn.Module
        An ``nn.Linear``; what has taken its place (a quantised or a low-rank layer, one with hooks) is just called.
    x : (..., in) tensor
    activation : callable, optional
        ``torch.relu`` and an exact ``nn.GELU`` can be part of the product.
    add : (..., out) tensor, optional

    Returns
    -------
    (..., out) tensor
    """
    if type(layer) is nn.Linear and not has_hooks(layer):
        return linear(x, layer.weight, layer.bias, activation, add)
    return _finish(layer(x), activation, add)


def linear(x, weight, bias=None, activation=None, add=None):
    """Compute ``activation(x weight^T + bias) + add``: x (..., in), weight (out, in) -> (..., out)."""
    if _by_pytorch(x, weight, weight.shape[0]):
        return _finish(functional.linear(x, weight, bias), activation, add)
    rows, shape = x.flatten(0, -2), (*x.shape[:-1], weight.shape[0])
    if _wants_gradient(x, weight, bias, add):
        y = Product.apply(rows, weight, bias).view(shape)
        return _finish(y, torch.relu_ if activation is torch.relu else activation, add)
    name = _fusible(activation)
    if name is None or (add is not None and activation is not None):
        return _finish(_multiply(rows, weight, bias).view(shape), activation, add)
    if add is None:
        return _multiply(rows, weight, bias, name).view(shape)
    add = add.expand(shape).reshape(-1, shape[-1])
    return torch.ops.mkldnn._linear_pointwise.binary(rows, add, weight, bias, "add").view(shape)


def inner_products(x, y):
    """Multiply every row of x with every row of y: (B, q, D), (B, n, D) -> (B, q, n)."""
    if _by_pytorch(x, y, y.shape[1]):
        return x @ y.transpose(1, 2)
    return torch.stack([linear(rows, columns) for rows, columns in zip(x.unbind(), y.unbind(), strict=True)])


def _by_pytorch(x, weight, out):
    """Whether a product is none of float32 on a CPU, is too small, or is being traced."""
    return (
        torch.compiler.is_compiling()  # first: what follows asks for a batch that may be free
        or torch.jit.is_tracing()
        or x.device.type != "cpu"
        or not x.dtype == weight.dtype == torch.float32
        or x.numel() * out < LEAST
        or torch.is_autocast_enabled("cpu")
        or dispatch.path("linear", x.device) == "plain"
    )


def _fusible(activation):
    """oneDNN's name of an activation, or None if it has none."""
    if activation is None:
        return "none"
    if activation is torch.relu:
        return "relu"
    exact = type(activation) is nn.GELU and activation.approximate == "none" and not has_hooks(activation)
    return "gelu" if exact else None


def _wants_gradient(*tensors):
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _finish(y, activation, add):
    """activation(y) + add"""
    y = y if activation is None else activation(y)
    return y if add is None else y + add


class Product(torch.autograd.Function):
    """x (n, k), weight (m, k), bias (m) or None -> x weight^T + bias (n, m), by oneDNN, float32."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _multiply(grad_out, weight.T)
        if ctx.needs_input_grad[1]:
            grad_weight = _multiply_columns(grad_out, x)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_out.sum(dim=0)
        return grad_x, grad_weight, grad_bias


def _multiply_columns(x, y):
    """Return x^T y: x (n, m), y (n, k) -> (m, k). oneDNN copies its first factor if that is transposed: the smaller."""
    if min(x.shape[1], y.shape[1]) < LEAST_SIDE:
        return x.T @ y
    return _multiply(x.T, y.T) if x.shape[1] <= y.shape[1] else _multiply(y.T, x.T).T


def _multiply(x, weight, bias=None, activation="none"):
    """Return activation(x weight^T + bias)."""
    if not (weight.is_contiguous() or weight.T.is_contiguous()):
        weight = weight.contiguous()  # with other strides oneDNN takes a thousand times as long
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none" if activation == "gelu" else "")


if hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.ops.mkldnn._linear_pointwise not in flop_registry:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _count_flops(x, *_, out_shape, **__):
        """Count the operations of a product for ``torch.utils.flop_counter``, from the shapes of its tensors."""
        return 2 * math.prod(x) * out_shape[-1]


@dispatch.trial("linear")
def _trial(path, device):
    """One layer of LEAST multiply-adds, with its gradients."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator).requires_grad_() for shape in ((128, 96), (96, 96), (96,))
    )
    y = Product.apply(x, weight, bias) if path == "onednn" else nn.functional.linear(x, weight, bias)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, weight, bias))]
