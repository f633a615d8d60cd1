"""Point-based Mask2Former: a pixel decoder and a query decoder on tokens (paper sec. 4.1; Cheng et al., Mask2Former).

Levels 0, 1, 2 are the backbone's token sets res5, res4, res3, everywhere.
"""

from dataclasses import dataclass, fields

import torch
from torch import nn

from .checks import check_arrays, check_choice, check_whole, is_whole, shown
from .deformable import LOOKUPS, DeformableAttention, lookup_tables
from .interpolation import shepard
from .ops import apply_linear, apply_multihead, inner_products
from .ops.indexing import autocast_device, gather_rows, tokenwise
from .pointconv import PointConv
from .segmenter import Segmenter, output

LEVELS = 3
SINE_MAXIMA = ("image", "batch")
MOST = {  # more is a slip, and would fill the memory
    "num_classes": 2**20, "hidden_dim": 2**14, "num_queries": 2**16, "heads": 2**14, "points": 2**10,
    "encoder_layers": 64, "decoder_layers": 64, "encoder_ffn": 2**20, "decoder_ffn": 2**20,
}  # fmt: skip


@dataclass(frozen=True)
class HeadConfig:
    """Shape and choices of a Mask2Former head."""

    num_classes: int = 150
    hidden_dim: int = 256  # D
    num_queries: int = 100
    heads: int = 8
    points: int = 4  # sampled places a level and head
    encoder_layers: int = 6
    decoder_layers: int = 9
    encoder_ffn: int = 1024
    decoder_ffn: int = 2048
    lookup: str = "rounded"  # or "exact": see deformable.py
    sine_max: str = "image"  # or "batch": what the sine code's positions are divided by

    def __post_init__(self):
        for field in fields(self):
            value, most = getattr(self, field.name), MOST.get(field.name)
            if most and not (is_whole(value) and 1 <= value <= most):
                raise ValueError(f"{field.name} must be a whole number from 1 to {most:,}, not {shown(value)}")
        if self.hidden_dim % 4 or self.hidden_dim % self.heads:
            raise ValueError(f"hidden_dim {self.hidden_dim} must be a multiple of 4 and of heads {self.heads}")
        check_choice("lookup", self.lookup, LOOKUPS)
        check_choice("sine_max", self.sine_max, SINE_MAXIMA)


def sine_embedding(positions, channels, largest=None, dtype=torch.float32):
    """Code positions (B, n, 2) as sines and cosines -> (B, n, D) of ``dtype``.

    For x, then for y: D/4 sines, then D/4 cosines, of 2 pi x / (largest + 1e-6) / 10000^(2 j / (D/2)), j = 0, 1, ...
    ``largest`` (B or 1, 2) is what x and y are divided by; by default the largest of each image's own positions.
    """
    check_arrays(positions=(positions, "whole", "B n 2"))
    check_whole("channels", channels, 4, MOST["hidden_dim"])
    if channels % 4:
        raise ValueError(f"channels must be a multiple of 4, not {channels}")
    largest = positions.amax(dim=1) if largest is None else largest
    check_arrays(largest=(largest, "real or whole", "B 2"))
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a dtype of real numbers, not {shown(dtype)}")
    angle = positions.to(dtype) / (largest[:, None].to(dtype) + 1e-6) * (2 * torch.pi)
    exponent = 2 * torch.arange(channels // 4, device=positions.device, dtype=dtype) / (channels // 2)
    parts = angle[..., None] / 10000.0**exponent  # (B, n, 2, D/4)
    return torch.cat([parts.sin(), parts.cos()], dim=-1).flatten(2)


def level_codes(positions, channels, sine_max, dtype):
    """Sine codes of the levels' positions, divided by the level's largest x and y, of each image or of the batch."""
    largest = [p.amax(dim=1) for p in positions]
    if sine_max == "batch":
        largest = [top.amax(dim=0, keepdim=True) for top in largest]
    return [sine_embedding(p, channels, top, dtype) for p, top in zip(positions, largest, strict=True)]


class EncoderLayer(nn.Module):
    """One layer of the pixel decoder's encoder: deformable attention and an MLP, norms after the sums."""

    def __init__(self, config):
        super().__init__()
        dim, self.hidden = config.hidden_dim, config.encoder_ffn
        self.attention = DeformableAttention(dim, config.heads, LEVELS, config.points, config.lookup)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, config.encoder_ffn), nn.Linear(config.encoder_ffn, dim)

    def forward(self, source, code, positions, level_sizes, grid_size, tables):
        """source and code (B, n, D), positions (B, n, 2) of all levels -> (B, n, D)."""
        query, modules = source + code, (self.norm1, self.fc1, self.fc2, self.norm2)
        summed = self.attention(query, positions, source, level_sizes, grid_size, tables, add=source)
        return tokenwise(self._feed_forward, summed, self.hidden, modules)

    def _feed_forward(self, summed):
        source = self.norm1(summed)
        return self.norm2(apply_linear(self.fc2, apply_linear(self.fc1, source, torch.relu), add=source))


def init_matrices(module):
    """Fill all weight matrices with Glorot's uniform numbers, as Mask2Former does."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)


class PixelDecoder(nn.Module):
    """Exchange features between the levels, then make mask features on the finest tokens."""

    def __init__(self, config, dims):
        super().__init__()
        self.config, dim = config, config.hidden_dim
        self.projections = nn.ModuleList(Projection(c, dim) for c in reversed(dims[1:]))
        self.level_embedding = nn.Parameter(torch.randn(LEVELS, dim))
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.adapter = Projection(dims[0], dim)
        self.pointconv = PointConv(dim, dim)
        self.pointconv_norm = nn.LayerNorm(dim)
        self.mask_features = nn.Linear(dim, dim)
        init_matrices(self)
        for layer in self.encoder:
            layer.attention.reset_parameters()

    def forward(self, token_sets):
        """Four TokenSets -> mask features (B, h w, D) in raster order, list of three levels' tokens (B, n, D).

        In float32 also under autocast: sampled places need the digits.
        """
        with torch.autocast(autocast_device(token_sets[0].features), enabled=False):
            return self._forward(
                [t.positions for t in token_sets], [self._wide(t.features) for t in token_sets], token_sets[0].grid_size
            )

    def _wide(self, features):
        return features.to(self.level_embedding.dtype)

    def _forward(self, positions, features, grid_size):
        deep = positions[:0:-1]  # res5, res4, res3
        sizes = [p.shape[1] for p in deep]
        tables = lookup_tables(deep, grid_size)
        source = torch.cat([net(f) for net, f in zip(self.projections, features[:0:-1], strict=True)], dim=1)
        codes = level_codes(deep, self.config.hidden_dim, self.config.sine_max, source.dtype)
        code = torch.cat([c + e for c, e in zip(codes, self.level_embedding, strict=True)], dim=1)
        where = torch.cat(deep, dim=1)
        for layer in self.encoder:
            source = layer(source, code, where, sizes, grid_size, tables)
        levels = list(source.split(sizes, dim=1))
        nearest = tables[2] - sum(sizes[:2])  # res2 holds every cell, in raster order
        from_res3 = shepard(positions[0], deep[2], levels[2], nearest)
        y = self.pointconv(positions[0], self.adapter(features[0]) + from_res3, grid_size)
        return apply_linear(self.mask_features, self.pointconv_norm(y).relu()), levels


class Projection(nn.Sequential):
    """Linear, then layer norm: the backbone's channels to the head's."""

    def __init__(self, channels, dim):
        super().__init__(nn.Linear(channels, dim), nn.LayerNorm(dim))

    def forward(self, x):
        """(B, n, channels) -> (B, n, dim)."""
        return self[1](apply_linear(self[0], x))


def attention_mask(mask_logits):
    """Which tokens each query must not see: (B, q, n) mask logits at the tokens -> (B, q, n) bool (masked attention).

    True where the query's mask is more likely absent than present, except for a query that would see nothing: that sees
    all. No gradient passes.
    """
    check_arrays(mask_logits=(mask_logits, "real", "B q n"))
    attn_mask = mask_logits.detach() < 0  # sigmoid < 1/2
    return attn_mask & ~attn_mask.all(dim=2, keepdim=True)


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention and an MLP, each followed by sum and norm."""

    def __init__(self, config):
        super().__init__()
        dim = config.hidden_dim
        self.cross_attention = nn.MultiheadAttention(dim, config.heads, batch_first=True)
        self.self_attention = nn.MultiheadAttention(dim, config.heads, batch_first=True)
        self.cross_norm, self.self_norm, self.ffn_norm = (nn.LayerNorm(dim) for _ in range(3))
        self.fc1, self.fc2 = nn.Linear(dim, config.decoder_ffn), nn.Linear(config.decoder_ffn, dim)

    def forward(self, out, memory, code, attn_mask, query_pos):
        """out (B, q, D), memory and its code (B, n, D), attn_mask (B, q, n), the queries' code (q, D) -> (B, q, D)."""
        update = apply_multihead(self.cross_attention, out + query_pos, memory + code, memory, attn_mask)
        out = self.cross_norm(out + update)
        query = out + query_pos
        out = self.self_norm(out + apply_multihead(self.self_attention, query, query, out))
        return self.ffn_norm(apply_linear(self.fc2, apply_linear(self.fc1, out, torch.relu), add=out))


class QueryDecoder(nn.Module):
    """Refine learnt queries layer by layer, layer i on level i mod ``levels``, and read classes and masks off them."""

    def __init__(self, config, levels=LEVELS):
        super().__init__()
        self.config, dim = config, config.hidden_dim
        self.query_features = nn.Embedding(config.num_queries, dim)
        self.query_positions = nn.Embedding(config.num_queries, dim)
        self.level_embedding = nn.Embedding(levels, dim)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        init_matrices(self.layers)
        self.norm = nn.LayerNorm(dim)
        self.class_head = nn.Linear(dim, config.num_classes + 1)  # the last class is "no object"
        self.mask_head = nn.ModuleList(nn.Linear(dim, dim) for _ in range(3))

    def predict(self, out, mask_features):
        """Classes and masks of queries (B, q, D) and tokens (B, t, D): -> (B, q, classes + 1), (B, q, t)."""
        y = self.norm(out)
        return self.class_head(y), self._masks(y, mask_features)

    def _masks(self, y, mask_features):
        """Mask logits (B, q, t) of queries (B, q, D) after the norm, at tokens (B, t, D)."""
        for layer in self.mask_head[:-1]:
            y = apply_linear(layer, y, torch.relu)
        return inner_products(apply_linear(self.mask_head[-1], y), mask_features)

    def forward(self, mask_features, levels, level_positions, at=None, auxiliary=True):
        """Make a prediction from the learnt queries and one after every layer.

        Parameters
        ----------
        mask_features : (B, t, D) tensor
            On the tokens that masks are predicted for.
        levels, level_positions : lists of (B, n, D) and (B, n, 2) tensors
        at : list of (B, n) int64 tensors, optional
            Where each level's tokens are among those t; by default they are the same tokens.
        auxiliary : bool
            If false only the last prediction is made: of those before it the attention masks alone, on their level.

        Returns
        -------
        list of (classes (B, q, classes + 1), mask logits (B, q, t))
        """
        codes = level_codes(level_positions, self.config.hidden_dim, self.config.sine_max, levels[0].dtype)
        out = self.query_features.weight.expand(mask_features.shape[0], -1, -1)
        predictions = [self.predict(out, mask_features)] if auxiliary else []
        on_levels = at is not None and not auxiliary
        features = [gather_rows(mask_features, tokens) for tokens in at] if on_levels else [mask_features] * len(levels)
        for i, layer in enumerate(self.layers):
            level = i % len(levels)
            memory = levels[level] + self.level_embedding.weight[level]
            if not auxiliary:
                masks = self._masks(self.norm(out), features[level])
            elif at is None:
                masks = predictions[-1][1]
            else:
                masks = predictions[-1][1].gather(2, at[level][:, None].expand(-1, out.shape[1], -1))
            out = layer(out, memory, codes[level], attention_mask(masks), self.query_positions.weight)
            if auxiliary or i + 1 == len(self.layers):
                predictions.append(self.predict(out, mask_features))
        return predictions


class Mask2Former(Segmenter):
    """A backbone (``features_only``) with the point-based Mask2Former head: images (B, 3, H, W) -> SegmenterOutput."""

    def __init__(self, backbone, config):
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.pixel_decoder = PixelDecoder(config, backbone.config.dims)
        self.decoder = QueryDecoder(config)

    def segment(self, images, auxiliary=True):
        """Images (B, 3, H, W) of one size -> SegmenterOutput, with or without auxiliary logits."""
        token_sets = self.backbone(images)
        mask_features, levels = self.pixel_decoder(token_sets)
        grid_size, positions = token_sets[0].grid_size, [t.positions for t in token_sets[:0:-1]]
        at = [
            p[..., 1] * grid_size[1] + p[..., 0] for p in positions
        ]  # the finest tokens are all cells, in raster order
        predictions = self.decoder(mask_features, levels, positions, at, auxiliary)
        return output([(classes, masks.unflatten(2, grid_size)) for classes, masks in predictions])
