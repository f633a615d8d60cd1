"""Local attention with relative position and a blank token (paper sec. 3.2, 4.2, 4.3; Eq. 2, 3)."""

import torch
from torch import nn

from .ops import apply_linear, neighborhood_attention
from .ops.attention.plain import local_attention
from .ops.indexing import tokenwise
from .position import PositionLinear

__all__ = ["Attention", "AttentionBlock", "DropPath", "local_attention"]


class Attention(nn.Module):
    """Project tokens to queries, keys and values, attend locally, project back: (B, n, C) -> (B, n, C)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)  # outputs laid out as [head][key or value][d]
        self.position = PositionLinear(5, heads)
        self.project = nn.Linear(dim, dim)
        self.blank_key = nn.Parameter(torch.empty(dim))
        self.blank_value = nn.Parameter(torch.empty(dim))
        nn.init.trunc_normal_(self.blank_key, std=0.02)
        nn.init.trunc_normal_(self.blank_value, std=0.02)

    def forward(self, x, geometry, add=None):
        """x (B, n, C), StageGeometry -> (B, n, C); ``add`` (B, n, C), if given, is added."""
        if not geometry.in_clusters:
            out = geometry.from_clusters(self(geometry.to_clusters(x), geometry.renumbered()))
            return out if add is None else out + add
        d = x.shape[-1] // self.heads
        query = apply_linear(self.query, x).unflatten(-1, (self.heads, d)) * d**-0.5
        kv = apply_linear(self.key_value, x).unflatten(-1, (self.heads, 2, d))
        blank = torch.stack([b.view(self.heads, d) for b in (self.blank_key, self.blank_value)], dim=1).to(query.dtype)
        out = neighborhood_attention(query, kv, blank, self.position.weight, self.position.bias, geometry)
        return apply_linear(self.project, out.flatten(2), add=add)


class DropPath(nn.Module):
    """Stochastic depth: in training, drop an image's whole update with this probability and scale up the others."""

    def __init__(self, probability):
        super().__init__()
        self.probability = probability

    def forward(self, x):
        if self.probability == 0 or not self.training:
            return x
        kept = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.probability
        return x * kept.to(x.dtype) / (1 - self.probability)


class AttentionBlock(nn.Module):
    """x + scale1 drop_path(attention(norm1 x)), then x + scale2 drop_path(mlp(norm2 x))."""

    def __init__(self, dim, heads, mlp_ratio, layer_scale, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        hidden = self.hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(dim, hidden))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(hidden, dim))
        self.drop_path = DropPath(drop_path)
        self.scale1 = self.scale2 = None
        if layer_scale is not None:
            self.scale1 = nn.Parameter(torch.full((dim,), float(layer_scale)))
            self.scale2 = nn.Parameter(torch.full((dim,), float(layer_scale)))

    def forward(self, x, geometry):
        """x (B, n, C), StageGeometry -> (B, n, C)."""
        modules = self.norm2, self.mlp, *self.mlp
        if self.scale1 is None and not (self.training and self.drop_path.probability):
            x = self.attention(self.norm1(x), geometry, add=x)
            return tokenwise(lambda part: self._feed_forward(part, add=part), x, self.hidden, modules)
        x = x + self._weigh(self.scale1, self.attention(self.norm1(x), geometry))
        return x + self._weigh(self.scale2, tokenwise(self._feed_forward, x, self.hidden, modules))

    def _feed_forward(self, x, add=None):
        mlp = self.mlp
        return apply_linear(mlp.fc2, apply_linear(mlp.fc1, self.norm2(x), mlp.gelu), add=add)

    def _weigh(self, scale, update):
        update = self.drop_path(update)
        return update if scale is None else scale * update
