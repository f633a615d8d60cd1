"""Linear layers in float32 on a CPU, by the faster of the libraries that PyTorch has.

PyTorch multiplies float32 matrices with MKL, which uses AVX-512 on Intel's processors alone. oneDNN, which PyTorch has
as well, uses it on all, and is twice as fast on the others: there ``onednn`` is the path.
"""

import math

import torch
from torch import nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from . import dispatch

LEAST = 2**20  # multiply-adds from which on oneDNN pays: below, starting it takes longer
LEAST_SIDE = 32  # of a weight, from which on its gradient is oneDNN's, too


def apply_linear(layer, x):
    """Apply a linear layer: what ``layer(x)`` returns, by the faster path.

    Parameters
    ----------
    layer : nn.Module
        An ``nn.Linear``; what has taken its place (a quantised or a low-rank layer, one with hooks) is just called.
    x : (..., in) tensor

    Returns
    -------
    (..., out) tensor
    """
    if _is_plain(layer, x) or dispatch.path("linear", x.device) == "plain":
        return layer(x)
    return Product.apply(x.flatten(0, -2), layer.weight, layer.bias).unflatten(0, x.shape[:-1])


def _is_plain(layer, x):
    """Whether ``layer(x)`` is something else than a float32 product on a CPU, too small, or being traced."""
    return (
        torch.compiler.is_compiling()  # first: what follows asks for a batch that may be free
        or torch.jit.is_tracing()
        or type(layer) is not nn.Linear
        or x.device.type != "cpu"
        or not x.dtype == layer.weight.dtype == torch.float32
        or x.numel() * layer.out_features < LEAST
        or torch.is_autocast_enabled("cpu")
        or bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
    )


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
            large = min(weight.shape) >= LEAST_SIDE
            grad_weight = _multiply(x.T, grad_out.T).T if large else grad_out.T @ x
        if ctx.needs_input_grad[2]:
            grad_bias = grad_out.sum(dim=0)
        return grad_x, grad_weight, grad_bias


def _multiply(x, weight, bias=None):
    """Return x weight^T + bias."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


if hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.ops.mkldnn._linear_pointwise not in flop_registry:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _count_flops(x, weight, *_, **__):
        """Count the operations of a product for ``torch.utils.flop_counter``, from the shapes of its factors."""
        return 2 * math.prod(x) * weight[0]


@dispatch.trial("linear")
def _trial(path, device):
    """One layer of LEAST multiply-adds, with its gradients."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator).requires_grad_() for shape in ((128, 96), (96, 96), (96,))
    )
    y = Product.apply(x, weight, bias) if path == "onednn" else nn.functional.linear(x, weight, bias)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, weight, bias))]
