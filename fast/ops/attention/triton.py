"""Fused local attention (paper sec. 3.2, 4.2; Eq. 2, 3, 5): position term, blank token, softmax and values at once.

logit_ij = q_i . k_j + w . e_ij + b with e_ij = (dx, dy, dist, dy/dist, dx/dist) of p_j - p_i, the last two 0 at dist 0;
the blank token's is q_i . k_blank; out_i = sum_j p_ij v_j + p_blank v_blank, p the softmax of the logits.
"""

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from .triton_kernels import forward_kernel, key_kernel, query_kernel
from .triton_plan import LARGEST, group_size, make_plan, plan_of

__all__ = ["backward", "forward", "make_plan", "plan_of"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COLUMNS = 32  # of a tile of logits


def forward(query, key_value, blank, weight, bias, plan):
    """Compute the attention of each token over its neighbourhood and the blank token.

    Parameters
    ----------
    query : (B, P, H, d) tensor
        float32, bfloat16, float16 or float64, with any strides; already scaled by d^-1/2. Tokens are in their places,
        cluster after cluster; what stands in an empty place does not matter.
    key_value : (B, P, H, 2, d) tensor of the same dtype, with any strides
    blank : (H, 2, d) tensor
        Key and value of the blank token.
    weight, bias : (H, 5) and (H,) tensors
        The position term's w and b; used in float32, or float64 with a float64 query.
    plan : Plan

    Returns
    -------
    out : (B, P, H, d) tensor of the query's dtype
        Zeros in empty places.
    lse : (B, P, H) tensor, float32, or float64 with a float64 query
        log sum exp of the logits, for ``backward``.

    Raises
    ------
    TypeError
        Another dtype.
    ValueError
        Shapes that do not fit together, or more elements than 32-bit indices hold.
    """
    given = query, key_value, blank, weight, bias
    _check(*given, plan)
    inputs, wide = _ready(*given), _wide(query.dtype)
    out = torch.empty_like(inputs[0], memory_format=torch.contiguous_format)
    lse = out.new_empty(out.shape[:3], dtype=wide)
    grid, sizes, tile = _launch(out, plan)
    if out.numel():
        with torch.cuda.device_of(out):
            lists = plan.cells, plan.near, plan.visible_start, plan.visible
            forward_kernel[grid](*inputs, *lists, out, lse, *_strides(inputs), *sizes, **tile)
    return out.to(query.dtype), lse


def backward(grad, out, lse, query, key_value, blank, weight, bias, plan):
    """Return the gradients of query, key_value, blank, weight and bias, in their shapes and dtypes.

    Parameters
    ----------
    grad : (B, P, H, d) tensor
        Of ``out``.
    out, lse : tensors
        What ``forward`` returned.
    query, key_value, blank, weight, bias, plan
        What it was given.
    """
    given = query, key_value, blank, weight, bias
    _check(*given, plan)
    inputs, wide = _ready(*given), _wide(query.dtype)
    grad_out, out, lse = _exact(grad.to(query.dtype)).contiguous(), _exact(out).contiguous(), lse.contiguous()
    grad_query, grad_pair = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[:2])
    grid, sizes, tile = _launch(out, plan)
    heads, d = out.shape[2:]
    partial = out.new_empty(grid[0] // max(1, heads), heads, 6 + 2 * d, dtype=wide)
    delta = torch.empty_like(lse)
    if out.numel():
        cells, strides = (plan.cells, plan.near), _strides(inputs)
        with torch.cuda.device_of(out):
            rest = grad_out, out, lse, delta, grad_query, partial
            query_kernel[grid](*inputs, *cells, plan.visible_start, plan.visible, *rest, *strides, *sizes, **tile)
            rest = grad_out, lse, delta, grad_pair
            pair, lists = (*inputs[:2], *inputs[3:]), (plan.seers_start, plan.seers)
            key_kernel[grid](*pair, *cells, *lists, *rest, *strides, *sizes, **tile)
    total = partial.sum(dim=0)  # (H, 6 + 2 d)
    small = total[:, 6:].unflatten(1, (2, d)), total[:, :5], total[:, 5]
    grads = grad_query, grad_pair, *(x.clone(memory_format=torch.contiguous_format) for x in small)  # own memory each
    return tuple(x.to(like.dtype) for x, like in zip(grads, given, strict=True))


def _wide(dtype):
    """The dtype of sums."""
    return torch.promote_types(dtype, torch.float32)


def _exact(x):
    """In the interpreter, which rounds bfloat16 wrongly, all is float32 or wider."""
    return x if isinstance(forward_kernel, JITFunction) else x.to(_wide(x.dtype))


def _ready(query, key_value, blank, weight, bias):
    """Channels next to each other; the parameters contiguous."""
    rows = (x if x.stride(-1) == 1 else x.contiguous() for x in (_exact(query), _exact(key_value)))
    return *rows, _exact(blank).contiguous(), *(x.to(_wide(query.dtype)).contiguous() for x in (weight, bias))


def _strides(inputs):
    """Of an image, a place and a head in query, and of those and from key to value in key_value."""
    return *inputs[0].stride()[:3], *inputs[1].stride()[:4]


def _launch(out, plan):
    """Grid, sizes and constants of a launch."""
    batch, places, heads, d = out.shape
    rows = group_size(plan.cluster_size) * plan.cluster_size
    groups = triton.cdiv(places, rows)
    height = max(16, triton.next_power_of_2(rows))
    warps = height * COLUMNS // 512
    tile = {
        "M": plan.cluster_size,
        "R": plan.near.shape[1],
        "ROWS": rows,
        "HEIGHT": height,
        "WIDTH": COLUMNS,
        "D": d,
        "CHANNELS": max(16, triton.next_power_of_2(d)),
        "WIDE": tl.float64 if out.dtype == torch.float64 else tl.float32,
        "num_warps": min(8, warps if out.dtype.itemsize == 2 else 4 * warps),  # no tensor cores for wider products
        "num_stages": 2,
        "enable_fp_fusion": True,
    }
    return (batch * groups * heads,), (places, groups, heads, int(len(plan.cells) > 1)), tile


def _check(query, key_value, blank, weight, bias, plan):
    batch, places, heads, d = query.shape
    if query.dtype not in DTYPES or query.dtype != key_value.dtype:
        raise TypeError(
            "query and key_value must both be float32, bfloat16, float16 or float64, not "
            f"{query.dtype} and {key_value.dtype}"
        )
    shapes = {
        "key_value": (key_value, (batch, places, heads, 2, d)),
        "blank": (blank, (heads, 2, d)),
        "weight": (weight, (heads, 5)),
        "bias": (bias, (heads,)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, not {tuple(tensor.shape)}")
    if len(plan.cells) not in (1, batch) or plan.cells.shape[2] != places:
        raise ValueError(
            f"the plan is of {len(plan.cells)} images of {plan.cells.shape[2]} places, the query of {batch} of {places}"
        )
    spread = max(places * x.stride(1) + heads * x.stride(2) for x in (query, key_value))
    if max(spread, 2 * places * heads * d, _launch(query, plan)[0][0]) > LARGEST:
        raise ValueError(
            f"{batch} x {places} tokens of {heads * d} channels do not fit 32-bit indices; use a smaller image or batch"
        )
