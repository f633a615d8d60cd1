"""Attention of several heads over all tokens, without what ``nn.MultiheadAttention`` copies for it."""

from torch import nn
from torch.nn import functional

from .indexing import has_hooks
from .linear import linear


def apply_multihead(module, query, key, value, attn_mask=None):
    """Apply a multi-head attention: what ``module(query, key, value, ...)[0]`` returns, by the faster products.

    Parameters
    ----------
    module : nn.Module
        An ``nn.MultiheadAttention`` with ``batch_first``; what has taken its place is just called.
    query, key, value : (B, q, D), (B, n, D) and (B, n, D) tensors
    attn_mask : (B, q, n) bool tensor, optional
        True where a query must not see a token, in all heads.

    Returns
    -------
    (B, q, D) tensor
    """
    if type(module) is not nn.MultiheadAttention or has_hooks(module):
        mask = None if attn_mask is None else attn_mask.repeat_interleave(module.num_heads, dim=0)
        return module(query, key, value, attn_mask=mask, need_weights=False)[0]
    sides = zip((query, key, value), module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3), strict=True)
    heads = (linear(*side).unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for side in sides)
    seen = None if attn_mask is None else ~attn_mask[:, None]
    out = functional.scaled_dot_product_attention(*heads, seen).transpose(1, 2).flatten(2)
    return linear(out, module.out_proj.weight, module.out_proj.bias)
