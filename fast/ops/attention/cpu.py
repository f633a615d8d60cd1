"""Local attention by kernels compiled for the CPU (cpu.cpp): forward, backward, and what they need of a stage."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..native import call

SOURCE = "attention/cpu.cpp"
BLOCK = 8  # places taken together, as in cpu.cpp


class Plan(NamedTuple):
    """What the kernels need of a stage's geometry, made once a stage; the batch axis may have length 1.

    Places are taken in N = ceil(k m / 8) blocks of 8, whatever the cluster size. A block's list names the blocks of
    keys that its 8 queries see, and says which query sees which key. There is memory for lists of ``width`` entries
    each, the most there can be; 64 lists lie one after another, then what they left is not used. Where every token sees
    all (k = 1) there are no lists.
    """

    cells: Tensor  # (B, 2, 8 N) float64: x and y of each place; 0 where it is empty
    there: Tensor  # (B, N) uint8: bit i of a block: whether its place i has a token
    lists: Tensor  # (B, N, 2) int64: where a block's list starts, and its length
    seen: Tensor  # (B N width,) int32: blocks of keys, ascending
    sees: Tensor  # (B N width,) int64: byte i of an entry: which of the 8 keys query i sees


def make_plan(positions, members, nearest):
    """Lay a stage's geometry out for the kernels. All sizes are known beforehand.

    Parameters
    ----------
    positions : (B, n, 2) int64 tensor
    members : (B, k, m) int64 tensor
        Tokens of each cluster, -1 in empty places.
    nearest : (B, n, R) int64 tensor
        Clusters that each token sees. Not read if k = 1.

    Returns
    -------
    Plan
    """
    plan, width = _empty_plan(positions, members, nearest), _width(members, nearest)
    inputs = (x.contiguous() for x in (positions, members, nearest))
    sizes = len(members), positions.shape[1], *members.shape[1:], nearest.shape[2]
    call(SOURCE, "attention_plan", *inputs, *plan, *sizes, width)
    return plan


def fake_plan(positions, members, nearest):
    """Tensors like those of ``make_plan``, without values, for torch.compile."""
    return _empty_plan(positions, members, nearest)


def _width(members, nearest):
    """Most blocks that the queries of a block can see."""
    k, m = members.shape[1:]
    if k == 1:
        return 0
    blocks_of_a_cluster = m // BLOCK if m % BLOCK == 0 else -(-(m - 1) // BLOCK) + 1
    return min(-(-k * m // BLOCK), BLOCK * nearest.shape[2] * blocks_of_a_cluster)


def _empty_plan(positions, members, nearest):
    batch, (k, m) = members.shape[0], members.shape[1:]
    blocks, width = -(-k * m // BLOCK), _width(members, nearest)
    return Plan(
        positions.new_empty(batch, 2, BLOCK * blocks, dtype=torch.float64),
        positions.new_empty(batch, blocks, dtype=torch.uint8),
        positions.new_empty(batch, blocks if width else 0, 2),
        positions.new_empty(batch * blocks * width, dtype=torch.int32),
        positions.new_empty(batch * blocks * width),
    )


def forward(query, kv, blank, weight, bias, plan, members):
    """Compute the attention of each token over its neighbourhood and the blank token.

    Parameters
    ----------
    query : (B, k m, H, d) tensor
        float32, float64, or 16-bit numbers, which are taken in float32. Already scaled by d^-1/2; tokens are in their
        places, cluster after cluster.
    kv : (B, k m, H, 2, d) tensor
    blank : (H, 2, d) tensor
        Key and value of the blank token.
    weight, bias : (H, 5) and (H,) tensors
        Of the position term.
    plan : Plan
    members : (B or 1, k, m) int64 tensor
        Those that the plan was made from.

    Returns
    -------
    out : (B, k m, H, d) tensor of the query's dtype
        0 in empty places.
    lse : (B, k m, H) tensor, float32, or float64 with a float64 query
        Logarithm of the sum of the exponentials of a token's logits, for ``backward``; 0 in empty places.
    """
    d = query.shape[-1]
    inputs = _ready(query, kv, blank, weight, bias)
    out, lse = torch.empty_like(inputs[0]), inputs[0].new_empty(query.shape[:3])
    sizes = _sizes(inputs[0], plan, members)
    call(SOURCE, "attention_forward" + _suffix(out), *inputs, *plan, _transposed(inputs[0], plan), out, lse, *sizes)
    return out[..., :d].contiguous().to(query.dtype), lse


def backward(grad_out, out, lse, query, kv, blank, weight, bias, plan, members):
    """Gradients of query, kv, blank, weight and bias, from that of ``out``.

    Empty places have gradients 0; what ``grad_out`` says of them is not read, as their ``out`` is constant.

    Parameters
    ----------
    grad_out, out : (B, k m, H, d) tensors
    lse : (B, k m, H) tensor
        Of ``forward``, like ``out``.
    query, kv, blank, weight, bias, plan, members
        As for ``forward``.
    """
    tensors = query, kv, blank, weight, bias
    inputs = _ready(*tensors)
    results = *(_filled(x, inputs[0].dtype) for x in (grad_out, out)), lse.contiguous()
    memory = _transposed(inputs[0], plan), _transposed(inputs[0], plan)
    grads = [torch.empty_like(x) for x in inputs]
    sizes = _sizes(inputs[0], plan, members)
    call(SOURCE, "attention_backward" + _suffix(inputs[0]), *results, *inputs, *plan, *memory, *grads, *sizes)
    return tuple(grad[..., : x.shape[-1]].contiguous().to(x.dtype) for grad, x in zip(grads, tensors, strict=True))


def _suffix(x):
    return "_f64" if x.dtype == torch.float64 else "_f32"


def _ready(query, kv, blank, weight, bias):
    """The inputs as the kernels read them."""
    wide = torch.promote_types(query.dtype, torch.float32)
    return *(_filled(x, wide) for x in (query, kv, blank)), *(x.to(wide).contiguous() for x in (weight, bias))


def _filled(x, dtype):
    """x in a dtype, contiguous, its channels filled up with zeros to a multiple of 8."""
    x = x.to(dtype).contiguous()
    return x if x.shape[-1] % BLOCK == 0 else pad(x, (0, -x.shape[-1] % BLOCK))


def _transposed(query, plan):
    """Memory for transposed keys or values, (B, N, H, d, 8)."""
    batch, _, heads, d = query.shape
    return query.new_empty(batch, plan.there.shape[1], heads, d, BLOCK)


def _sizes(query, plan, members):
    batch, places, heads, d = query.shape
    return batch, len(plan.there), places, heads, d, int(members.shape[1] == 1)
