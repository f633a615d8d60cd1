"""Local attention with relative position and a blank token (paper sec. 3.2, 4.2, 4.3; Eq. 2, 3)."""

import torch
from torch import nn

from .ops import attention as attention_operator
from .ops import dispatch
from .ops.indexing import gather_rows, token_slices


def local_attention(query, key, value, neighbors, valid, bias, blank_key, blank_value):
    """Let each token attend to its neighbourhood and to the blank token.

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
        seen = (weight[..., None, :-1] @ gather_rows(value, near, 1)).squeeze(-2)  # (H, B, rows, d)
        out.append(seen + weight[..., -1:] * blank_value[:, None, None])
    return torch.cat(out, dim=2).permute(1, 2, 0, 3)


def attention_by_clusters(query, key_value, blank, weight, bias, geometry):
    """Compute what ``local_attention`` does with the position term, in one operator that runs the fastest path.

    Forward and backward, with float32 or wider sums: the operators ``aff::attention``, ``aff::attention_backward``.

    Parameters
    ----------
    query : (B, k m, H, d) tensor
        Already scaled by d^-1/2; tokens as ``StageGeometry.to_clusters`` puts them.
    key_value : (B, k m, H, 2, d) tensor
    blank : (H, 2, d) tensor
        Key and value of the blank token.
    weight, bias : (H, 5) and (H,) tensors
        The position term's: bias_ij = weight . relative_position(p_j - p_i) + bias.
    geometry : StageGeometry
        With ``in_clusters``.

    Returns
    -------
    (B, k m, H, d) tensor
    """
    g = geometry
    return attention_operator.attention(
        query, key_value, blank, weight, bias, g.positions, g.members, g.nearest, list(g.plan)
    )[0]


class Attention(nn.Module):
    """Project tokens to queries, keys and values, attend locally, project back: (B, n, C) -> (B, n, C)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)  # outputs laid out as [head][key or value][d]
        self.position = nn.Linear(5, heads)
        self.project = nn.Linear(dim, dim)
        self.blank_key = nn.Parameter(torch.empty(dim))
        self.blank_value = nn.Parameter(torch.empty(dim))
        nn.init.trunc_normal_(self.blank_key, std=0.02)
        nn.init.trunc_normal_(self.blank_value, std=0.02)

    def forward(self, x, geometry):
        """x (B, n, C), StageGeometry -> (B, n, C)."""
        plain = dispatch.path("attention", x.device) == "gather"
        if not plain and not geometry.in_clusters:
            return geometry.from_clusters(self(geometry.to_clusters(x), geometry.renumbered()))
        d = x.shape[-1] // self.heads
        query = self.query(x).unflatten(-1, (self.heads, d)) * d**-0.5
        key_value = self.key_value(x).unflatten(-1, (self.heads, 2, d))
        blank = torch.stack([b.view(self.heads, d) for b in (self.blank_key, self.blank_value)], dim=1).to(query.dtype)
        if plain:
            pair, bias = (key_value.unbind(-2), self.position_term(geometry.relative))
            out = local_attention(query, *pair, geometry.neighbors, geometry.valid, bias, *blank.unbind(1))
        else:
            out = attention_by_clusters(query, key_value, blank, self.position.weight, self.position.bias, geometry)
        return self.project(out.flatten(2))

    def position_term(self, relative):
        """P of Eq. 2, (..., 5) -> (..., H), in float32 or wider also under autocast: it needs the digits."""
        with torch.autocast(relative.device.type, enabled=False):
            return self.position(relative.to(self.position.weight.dtype))


class DropPath(nn.Module):
    """Stochastic depth: in training, drop an image's whole update with this probability and scale up the others."""

    def __init__(self, probability):
        super().__init__()
        self.probability = probability

    def forward(self, x):
        if self.probability == 0 or not self.training:
            return x
        kept = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= self.probability
        return x * kept.to(x.dtype) / (1 - self.probability)


class AttentionBlock(nn.Module):
    """x + scale1 drop_path(attention(norm1 x)), then x + scale2 drop_path(mlp(norm2 x))."""

    def __init__(self, dim, heads, mlp_ratio, layer_scale, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(dim, hidden))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(hidden, dim))
        self.drop_path = DropPath(drop_path)
        self.scale1 = self.scale2 = 1.0
        if layer_scale is not None:
            self.scale1 = nn.Parameter(torch.full((dim,), float(layer_scale)))
            self.scale2 = nn.Parameter(torch.full((dim,), float(layer_scale)))

    def forward(self, x, geometry):
        """x (B, n, C), StageGeometry -> (B, n, C)."""
        x = x + self.scale1 * self.drop_path(self.attention(self.norm1(x), geometry))
        return x + self.scale2 * self.drop_path(self.mlp(self.norm2(x)))
