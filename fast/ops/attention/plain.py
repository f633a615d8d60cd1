"""Local attention token by token (paper sec. 3.2, 4.2, 4.3; Eq. 2, 3): eager PyTorch, the definition of this side."""

import torch
from torch.nn.functional import linear

from ..indexing import autocast_device, gather_rows, token_slices


def local_attention(query, key, value, neighbors, valid, bias, blank_key, blank_value):
    """Compute the attention of each token over its neighbourhood and the blank token.

    Parameters
    ----------
    query, key, value : (B, n, H, d) tensors
        The query already scaled by d^-1/2.
    neighbors : (B or 1, n, M) int64 tensor
    valid : (B or 1, n, M) bool tensor or None
        False for slots that get no weight; None: all count.
    bias : (B or 1, n, M, H) tensor
        The position term P of Eq. 2.
    blank_key, blank_value : (H, d) tensors

    Returns
    -------
    (B, n, H, d) tensor
    """
    batch, n, heads, d = query.shape
    query, key, value = (x.permute(2, 0, 1, 3).contiguous() for x in (query, key, value))  # (H, B, n, d)
    blank = torch.einsum("hbnd,hd->hbn", query, blank_key)[..., None]
    out = []
    for part in token_slices(neighbors, batch * heads * d):
        near = neighbors[:, part].expand(batch, -1, -1)  # (B, rows, M)
        logits = (gather_rows(key, near, 1) @ query[:, :, part, :, None]).squeeze(-1)  # (H, B, rows, M)
        logits = logits + bias[:, part].permute(3, 0, 1, 2)
        if valid is not None:
            logits = logits.masked_fill(~valid[:, part], -torch.inf)
        weight = torch.cat([logits, blank[:, :, part].to(logits.dtype)], dim=-1).softmax(dim=-1).to(value.dtype)
        of_neighbors = (weight[..., None, :-1] @ gather_rows(value, near, 1)).squeeze(-2)  # (H, B, rows, d)
        out.append(of_neighbors + weight[..., -1:] * blank_value[:, None, None])
    return torch.cat(out, dim=2).permute(1, 2, 0, 3)


def attention(query, kv, blank, weight, bias, geometry):
    """``ops.neighborhood_attention`` by ``local_attention``: same arguments, same result."""
    with torch.autocast(autocast_device(query), enabled=False):  # position needs the digits
        position = linear(geometry.relative.to(weight.dtype), weight, bias)
    return local_attention(query, *kv.unbind(3), geometry.neighbors, geometry.valid, position, *blank.unbind(1))
