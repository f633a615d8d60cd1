"""Point-based Mask2Former: a pixel decoder and a query decoder on tokens (paper sec. 4.1; Cheng et al., Mask2Former).

Levels 0, 1, 2 are the backbone's token sets res5, res4, res3, everywhere. Weights are named as ``fast``'s segmenter
names them: ``pixel_decoder.*`` and ``decoder.*``.
"""

from dataclasses import dataclass, fields

import numpy as np

from .checks import check_arrays, check_choice, check_indices, check_sides, check_whole, is_whole, shown
from .deformable import LOOKUPS, deformable_attention, lookup_table
from .interpolation import shepard
from .layers import as_weights, layer_norm, linear, multihead_attention, relu, subset
from .pointconv import pointconv

SINE_MAXIMA = ("image", "batch")
MOST = {  # more is a slip, and would fill the memory
    "num_classes": 2**20, "hidden_dim": 2**14, "num_queries": 2**16, "heads": 2**14, "points": 2**10,
    "encoder_layers": 64, "decoder_layers": 64, "encoder_ffn": 2**20, "decoder_ffn": 2**20,
}  # fmt: skip


@dataclass(frozen=True)
class HeadConfig:
    """Shape and choices of a Mask2Former head (sec. 4.1)."""

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


def sine_embedding(positions, channels, largest=None):
    """Code positions as sines and cosines (sec. 4.1).

    Parameters
    ----------
    positions : (n, 2) int64 array
    channels : int
        D, a multiple of 4.
    largest : (2,) array, optional
        Largest x and y to divide by; by default those of the positions themselves.

    Returns
    -------
    (n, D) float64 array
        For x, then for y: D/4 sines, then D/4 cosines, of 2 pi x / (largest + 1e-6) / 10000^(2 j / (D/2)), j = 0, 1 ..
    """
    check_arrays(positions=(positions, "whole", "n 2"))
    check_whole("channels", channels, 4, MOST["hidden_dim"])
    if channels % 4:
        raise ValueError(f"channels must be a multiple of 4, not {channels}")
    largest = positions.max(axis=0) if largest is None else largest
    check_arrays(largest=(largest, "real or whole", "2"))
    angle = positions / (largest + 1e-6) * 2 * np.pi
    divisor = 10000.0 ** (2 * np.arange(channels // 4) / (channels // 2))
    parts = angle[:, :, None] / divisor  # (n, 2, D/4)
    return np.concatenate([np.sin(parts), np.cos(parts)], axis=-1).reshape(len(positions), channels)


def encoder_layer(source, code, positions, level_sizes, grid_size, weights, config):
    """One layer of the pixel decoder's encoder, norms after the sums: source (n, D) -> (n, D) (sec. 4.1)."""
    update = deformable_attention(
        source + code,
        positions,
        source,
        level_sizes,
        grid_size,
        subset(weights, "attention"),
        config.heads,
        config.points,
        config.lookup,
    )
    source = layer_norm(source + update, subset(weights, "norm1"))
    hidden = relu(linear(source, subset(weights, "fc1")))
    return layer_norm(source + linear(hidden, subset(weights, "fc2")), subset(weights, "norm2"))


def pixel_decoder(token_sets, grid_size, weights, config, largest=None):
    """Exchange features between the levels, then make mask features on the finest tokens (sec. 4.1).

    Parameters
    ----------
    token_sets : list of (positions (n, 2), features (n, C))
        res2, res3, res4, res5 of the backbone.
    grid_size : (h, w)
    weights : dict
        ``projections.<level>``, ``level_embedding``, ``encoder.<i>``, ``adapter``, ``pointconv``, ``pointconv_norm``,
        ``mask_features``.
    config : HeadConfig
    largest : list of (2,) arrays, optional
        For ``sine_embedding``, one a level.

    Returns
    -------
    mask_features : (n_res2, D) array
    levels : list of three (n, D) arrays
        The last encoder layer's tokens of levels 0, 1, 2.
    """
    res2_positions, res2 = token_sets[0]
    deep = token_sets[:0:-1]  # res5, res4, res3
    sizes = [len(positions) for positions, _ in deep]
    positions = np.concatenate([p for p, _ in deep])
    source = np.concatenate([_project(f, subset(weights, f"projections.{i}")) for i, (_, f) in enumerate(deep)])
    codes = _level_codes([p for p, _ in deep], config.hidden_dim, largest)
    code = np.concatenate([c + weights["level_embedding"][i] for i, c in enumerate(codes)])
    for i in range(config.encoder_layers):
        layer = subset(weights, f"encoder.{i}")
        source = encoder_layer(source, code, positions, sizes, grid_size, layer, config)
    levels = np.split(source, np.cumsum(sizes)[:-1])
    from_res3 = shepard(res2_positions, deep[2][0], levels[2], _nearest_at(res2_positions, deep[2][0], grid_size))
    x = _project(res2, subset(weights, "adapter")) + from_res3
    y = pointconv(res2_positions, x, subset(weights, "pointconv"))
    y = relu(layer_norm(y, subset(weights, "pointconv_norm")))
    return linear(y, subset(weights, "mask_features")), levels


def _project(features, weights):
    """Linear, then layer norm."""
    return layer_norm(linear(features, subset(weights, "0")), subset(weights, "1"))


def _level_codes(positions, channels, largest):
    """Sine codes of the three levels."""
    largest = largest or [None] * len(positions)
    return [sine_embedding(p, channels, top) for p, top in zip(positions, largest, strict=True)]


def _nearest_at(cells, positions, grid_size):
    """Nearest 4 tokens of some cells of the grid."""
    return lookup_table(positions, grid_size)[cells[:, 1] * grid_size[1] + cells[:, 0]]


def attention_mask(mask_logits):
    """Which tokens each query must not see: (q, n) mask logits at the tokens -> (q, n) bool (masked attention).

    Mask2Former, eq. 3.

    True where the query's mask is more likely absent than present, except for a query that would see nothing: that sees
    all.
    """
    check_arrays(mask_logits=(mask_logits, "real", "q n"))
    attn_mask = mask_logits < 0  # sigmoid < 1/2
    return attn_mask & ~attn_mask.all(axis=1, keepdims=True)


def predict(out, mask_features, weights):
    """Classes and masks of the queries: out (q, D) -> logits (q, classes + 1), mask logits (q, n_res2).

    Mask2Former, sec. 3.
    """
    y = layer_norm(out, subset(weights, "norm"))
    x = relu(linear(y, subset(weights, "mask_head.0")))
    x = relu(linear(x, subset(weights, "mask_head.1")))
    return linear(y, subset(weights, "class_head")), linear(x, subset(weights, "mask_head.2")) @ mask_features.T


def decoder_layer(out, memory, code, attn_mask, weights, heads):
    """One layer of the query decoder: masked cross-attention, self-attention, MLP, each followed by sum and norm.

    Mask2Former, eq. 2.
    """
    query_pos = weights["query_positions"]
    update = multihead_attention(
        out + query_pos, memory + code, memory, subset(weights, "cross_attention"), heads, attn_mask
    )
    out = layer_norm(out + update, subset(weights, "cross_norm"))
    update = multihead_attention(out + query_pos, out + query_pos, out, subset(weights, "self_attention"), heads)
    out = layer_norm(out + update, subset(weights, "self_norm"))
    hidden = relu(linear(out, subset(weights, "fc1")))
    return layer_norm(out + linear(hidden, subset(weights, "fc2")), subset(weights, "ffn_norm"))


def query_decoder(mask_features, levels, level_positions, grid_size, weights, config, largest=None):
    """Refine the queries layer by layer, layer i on level i mod (number of levels) (Mask2Former, sec. 3.2).

    Parameters
    ----------
    mask_features : (h w, D) array
        On the finest tokens, raster order.
    levels : list of (n, D) arrays
    level_positions : list of (n, 2) int64 arrays
    grid_size : (h, w)
    weights : dict
        ``query_features``, ``query_positions``, ``level_embedding``, ``layers.<i>``, ``norm``, ``class_head``,
        ``mask_head``.
    config : HeadConfig
    largest : list of (2,) arrays, optional

    Returns
    -------
    list of (class logits (q, classes + 1), mask logits (q, h w))
        Of the learnt queries and after every layer; the last is the result.
    """
    codes = _level_codes(level_positions, config.hidden_dim, largest)
    out = weights["query_features.weight"]
    predictions = [predict(out, mask_features, weights)]
    for i in range(config.decoder_layers):
        level = i % len(levels)
        memory = levels[level] + weights["level_embedding.weight"][level]
        cells = level_positions[level]  # among the finest tokens, which hold every cell in raster order
        attn_mask = attention_mask(predictions[-1][1][:, cells[:, 1] * grid_size[1] + cells[:, 0]])
        layer = {**subset(weights, f"layers.{i}"), "query_positions": weights["query_positions.weight"]}
        out = decoder_layer(out, memory, codes[level], attn_mask, layer, config.heads)
        predictions.append(predict(out, mask_features, weights))
    return predictions


def _check_inputs(token_sets, grid_size, config):
    """Refuse what is no list of four (positions, features) on a grid, or no HeadConfig."""
    check_sides("grid_size", grid_size)
    if not isinstance(config, HeadConfig):
        raise TypeError(f"config must be a HeadConfig, not {shown(type(config).__name__)}")
    pairs = token_sets if isinstance(token_sets, tuple | list) and len(token_sets) == 4 else [None]
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise TypeError(f"token_sets must be four pairs of arrays, not {shown(type(token_sets).__name__)}")
    for i, (positions, features) in enumerate(pairs):
        name = f"positions of token set {i}"
        check_arrays(**{name: (positions, "whole", "n+ 2"), f"features of token set {i}": (features, "real", "n C")})
        for axis, side in enumerate(grid_size[::-1]):
            check_indices(name, positions[:, axis], side)


def forward(token_sets, grid_size, weights, config, largest=None):
    """Segment one image from the backbone's four token sets; see ``pixel_decoder`` and ``query_decoder`` (sec. 4.1).

    Returns
    -------
    predictions : list of (class logits (q, classes + 1), mask logits (q, h, w))
    mask_features, levels
        As ``pixel_decoder`` returns them.
    """
    _check_inputs(token_sets, grid_size, config)
    weights = as_weights(weights)
    part = subset(weights, "pixel_decoder")
    mask_features, levels = pixel_decoder(token_sets, grid_size, part, config, largest)
    positions = [p for p, _ in token_sets[:0:-1]]
    part = subset(weights, "decoder")
    predictions = query_decoder(mask_features, levels, positions, grid_size, part, config, largest)
    shaped = [(classes, masks.reshape(-1, *grid_size)) for classes, masks in predictions]
    return shaped, mask_features, levels
