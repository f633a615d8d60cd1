"""Floating-point operations of a forward pass: PyTorch's counter, and formulas for the operators it does not know.

A multiply-add counts as two, as in ``torch.utils.flop_counter``, which counts matrix products and convolutions. What
it sees as one opaque step is counted here: local attention (queries times keys, weights times values, the position
term; what a token sees is limited by how many tokens there are), merging and PointConv (the weight network and the sum
over a neighbourhood) and sampling (Shepard's weights times values). Not counted, as there: elementwise operations,
norms, softmax, and the integer work of ordering tokens and finding neighbours, which costs time nonetheless.
"""

from math import prod

import torch
from torch.utils.flop_counter import FlopCounterMode

from fast.attention import Attention

OFFSETS, MID_CHANNELS = 5, 4  # numbers of a relative position (Eq. 5), weights of a neighbour (Eq. 4)


def merge_flop(features, scores, positions, kept, neighbors, *_, **__):
    """Count ``aff::merge``: shapes of its tensors -> operations."""
    return 2 * prod(neighbors) * MID_CHANNELS * (OFFSETS + features[-1])


def sample_flop(locations, attention, positions, values, nearest, *_, **__):
    """Count ``aff::sample``."""
    return 2 * prod(nearest) * values[-1]


def sample_levels_flop(offsets, logits, tables, positions, values, *_, **__):
    """Count ``aff::sample_levels``: each location reads 4 tokens."""
    return 2 * 4 * prod(offsets[:-1]) * values[-1]


def attention_flop(attention, x, geometry):
    """Count local attention without its projections.

    Parameters
    ----------
    attention : fast.attention.Attention
    x : (B, n or k m, C) tensor
    geometry : StageGeometry

    Returns
    -------
    int
    """
    n = geometry.positions.shape[1]
    seen = min(geometry.nearest.shape[2] * geometry.members.shape[2], n) + 1  # and the blank token
    channels = x.shape[-1]
    return len(x) * n * seen * (4 * channels + 2 * OFFSETS * attention.heads)


@torch.enable_grad()  # the counter follows modules by their gradients
def count_flops(model, images):
    """Count the operations of ``model(images)``.

    Parameters
    ----------
    model : Module
        A classifier, feature extractor or segmenter of ``fast``, in evaluation mode.
    images : (B, 3, H, W) tensor

    Returns
    -------
    int
    """
    known = {
        torch.ops.aff.merge: merge_flop,
        torch.ops.aff.sample: sample_flop,
        torch.ops.aff.sample_levels: sample_levels_flop,
    }
    model(images)  # operators try their paths when they are first called
    local = []
    hooks = [
        module.register_forward_pre_hook(lambda *arguments: local.append(_once(*arguments)))
        for module in model.modules()
        if isinstance(module, Attention)
    ]
    try:
        with FlopCounterMode(display=False, custom_mapping=known) as counter:
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return counter.get_total_flops() + sum(local)


def _once(attention, inputs):
    """Count a call, but not that which Attention makes of itself to put tokens into clusters first."""
    x, geometry = inputs
    return attention_flop(attention, x, geometry) if geometry.in_clusters else 0
