"""The baseline for the segmentation heads: the reference's formulas, word for word in plain PyTorch, in any dtype.

One image at a time, no care for speed. Neighbours come from the reference; weights are flat dicts of tensors.
"""

import numpy as np
import torch

from parity_tests.plain import layer_norm, linear, merge_neighborhoods, relative_position, slot_weights
from reference.deformable import lookup_table, nearest_by_table, nearest_exact
from reference.interpolation import FLOOR
from reference.layers import subset
from reference.neighborhoods import nearest_tokens


def shepard_weights(points, neighbors, half_power):
    points, neighbors = torch.as_tensor(points), torch.as_tensor(neighbors)
    squared = ((neighbors - points[..., None, :]) ** 2).sum(dim=-1)
    u = 1 / (squared**half_power + FLOOR)
    return u / u.sum(dim=-1, keepdim=True)


def shepard(points, positions, features, nearest, half_power):
    nearest, positions = torch.as_tensor(nearest), torch.as_tensor(positions)
    weights = shepard_weights(torch.as_tensor(points).to(features.dtype), positions[nearest], half_power)
    return torch.einsum("qk,qkc->qc", weights, features[nearest])


def pointconv(positions, features, weights):
    nearest = nearest_tokens(positions, positions, 9)
    relative = relative_position(positions[:, None] - positions[nearest], features.dtype)
    slots = slot_weights(relative, np.ones(nearest.shape, dtype=bool), subset(weights, "weight_net"))
    mixed = merge_neighborhoods(features, torch.ones_like(features[:, 0]), nearest, slots)
    return linear(layer_norm(mixed, subset(weights, "norm")), subset(weights, "linear"))


def deformable_attention(query, positions, source, level_sizes, grid_size, weights, heads, points, lookup="rounded"):
    n, levels = len(query), len(level_sizes)
    offsets = linear(query, subset(weights, "sampling_offsets")).reshape(n, heads, levels, points, 2)
    sampling_locations = torch.as_tensor(positions)[:, None, None, None] + offsets
    logits = linear(query, subset(weights, "attention_weights")).reshape(n, heads, levels * points)
    attention = logits.softmax(dim=-1).reshape(n, heads, levels, points)
    values = linear(source, subset(weights, "value")).reshape(n, heads, -1)
    out, start = 0, 0
    for level, size in enumerate(level_sizes):
        tokens = slice(start, start + size)
        sampled = _sample(
            sampling_locations[:, :, level], positions[tokens], values[tokens], grid_size, weights, lookup
        )
        out, start = out + torch.einsum("nhp,nhpd->nhd", attention[:, :, level], sampled), start + size
    return linear(out.reshape(n, -1), subset(weights, "output"))


def _sample(sampling_locations, positions, values, grid_size, weights, lookup):
    exact = sampling_locations.detach().double().numpy()
    if lookup == "rounded":
        nearest = nearest_by_table(exact, lookup_table(positions, grid_size), grid_size)
    else:
        nearest = nearest_exact(exact, positions)
    weight = shepard_weights(sampling_locations, positions[nearest], weights["shepard_power"])
    return torch.einsum("qhpk,qhpkd->qhpd", weight, values[nearest, np.arange(values.shape[1])[:, None, None]])


def sine_embedding(positions, channels, largest, dtype):
    positions = torch.as_tensor(positions).to(dtype)
    largest = positions.amax(dim=0) if largest is None else torch.as_tensor(largest).to(dtype)
    angle = positions / (largest + 1e-6) * 2 * torch.pi
    parts = angle[:, :, None] / 10000.0 ** (2 * torch.arange(channels // 4).to(dtype) / (channels // 2))
    return torch.cat([parts.sin(), parts.cos()], dim=-1).reshape(len(positions), channels)


def encoder_layer(source, code, positions, level_sizes, grid_size, weights, config):
    settings = subset(weights, "attention"), config.heads, config.points, config.lookup
    update = deformable_attention(source + code, positions, source, level_sizes, grid_size, *settings)
    source = layer_norm(source + update, subset(weights, "norm1"))
    hidden = linear(source, subset(weights, "fc1")).relu()
    return layer_norm(source + linear(hidden, subset(weights, "fc2")), subset(weights, "norm2"))


def multihead_attention(query, key, value, weights, heads, attn_mask=None):
    w, b = weights["in_proj_weight"].chunk(3), weights["in_proj_bias"].chunk(3)
    q, k, v = ((x @ wi.T + bi).reshape(len(x), heads, -1) for x, wi, bi in zip((query, key, value), w, b, strict=True))
    logits = torch.einsum("qhd,nhd->hqn", q, k) / q.shape[-1] ** 0.5
    if attn_mask is not None:
        logits = logits.masked_fill(torch.as_tensor(attn_mask), -torch.inf)
    out = torch.einsum("hqn,nhd->qhd", logits.softmax(dim=-1), v).reshape(len(query), -1)
    return linear(out, subset(weights, "out_proj"))


def decoder_layer(out, memory, code, attn_mask, weights, heads):
    query_pos = weights["query_positions"]
    update = multihead_attention(
        out + query_pos, memory + code, memory, subset(weights, "cross_attention"), heads, attn_mask
    )
    out = layer_norm(out + update, subset(weights, "cross_norm"))
    update = multihead_attention(out + query_pos, out + query_pos, out, subset(weights, "self_attention"), heads)
    out = layer_norm(out + update, subset(weights, "self_norm"))
    hidden = linear(out, subset(weights, "fc1")).relu()
    return layer_norm(out + linear(hidden, subset(weights, "fc2")), subset(weights, "ffn_norm"))


def predict(out, mask_features, weights):
    y = layer_norm(out, subset(weights, "norm"))
    x = linear(linear(y, subset(weights, "mask_head.0")).relu(), subset(weights, "mask_head.1")).relu()
    return linear(y, subset(weights, "class_head")), linear(x, subset(weights, "mask_head.2")) @ mask_features.T


def soft_assignment(candidates, fine, coarse, weights):
    a = torch.nn.functional.normalize(fine @ weights["fine.weight"].T, dim=-1)
    coarse = layer_norm(coarse, subset(weights, "coarse_norm"))
    b = torch.nn.functional.normalize(coarse @ weights["coarse.weight"].T, dim=-1)
    cosine = torch.einsum("ne,nke->nk", a, b[torch.as_tensor(candidates)])
    return (cosine / (weights["temperature"].abs() + 1e-8)).softmax(dim=-1)


def decode_clusters(values, candidates, assignment):
    return torch.einsum("nk,nkv->nv", assignment, values[torch.as_tensor(candidates)])
