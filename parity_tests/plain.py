"""The baseline of the rule of parity: the reference's formulas, word for word in plain PyTorch, in any dtype.

One image at a time, no care for speed. Geometry comes from the reference; weights are flat dicts of tensors.
"""

import torch
from torch.nn import functional

from reference.layers import EPSILON, subset


def linear(x, weights):
    return functional.linear(x, weights["weight"], weights["bias"])


def layer_norm(x, weights):
    return functional.layer_norm(x, x.shape[-1:], weights["weight"], weights["bias"], EPSILON)


def relative_position(offsets, dtype):
    dx, dy = torch.as_tensor(offsets).to(dtype).unbind(-1)
    distance = torch.sqrt(dx**2 + dy**2)
    divisor = torch.where(distance == 0, 1, distance)
    return torch.stack([dx, dy, distance, dy / divisor, dx / divisor], dim=-1)


def local_attention(query, key, value, neighbors, valid, bias, blank_key, blank_value):
    neighbors, valid = torch.as_tensor(neighbors), torch.as_tensor(valid)
    logits = torch.einsum("nhd,nmhd->nmh", query, key[neighbors]) + bias
    logits = logits.masked_fill(~valid[:, :, None], -torch.inf)
    blank = torch.einsum("nhd,hd->nh", query, blank_key)[:, None]
    weight = torch.cat([logits, blank], dim=1).softmax(dim=1)
    return torch.einsum("nmh,nmhd->nhd", weight[:, :-1], value[neighbors]) + weight[:, -1, :, None] * blank_value


def attention(x, geometry, weights, heads):
    n, channels = x.shape
    d = channels // heads
    key, value = linear(x, subset(weights, "key_value")).reshape(n, heads, 2, d).unbind(2)
    out = local_attention(
        linear(x, subset(weights, "query")).reshape(n, heads, d) * d**-0.5,
        key,
        value,
        geometry.neighbors,
        geometry.valid,
        linear(torch.from_numpy(geometry.relative).to(x.dtype), subset(weights, "position")),
        weights["blank_key"].reshape(heads, d),
        weights["blank_value"].reshape(heads, d),
    )
    return linear(out.reshape(n, channels), subset(weights, "project"))


def attention_block(x, geometry, weights, heads):
    update = attention(layer_norm(x, subset(weights, "norm1")), geometry, subset(weights, "attention"), heads)
    x = x + update * weights.get("scale1", 1.0)
    hidden = functional.gelu(linear(layer_norm(x, subset(weights, "norm2")), subset(weights, "mlp.fc1")))
    return x + linear(hidden, subset(weights, "mlp.fc2")) * weights.get("scale2", 1.0)


def importance(features, weights):
    return linear(features, weights)[:, 0].sigmoid()


def slot_weights(relative, valid, weights):
    w = functional.gelu(layer_norm(linear(relative, subset(weights, "0")), subset(weights, "1")))
    return torch.where(torch.as_tensor(valid)[:, :, None], w, 0)


def merge_neighborhoods(features, scores, neighbors, slots):
    weighted = scores[:, None] * features
    return torch.einsum("kmw,kmc->kwc", slots, weighted[torch.as_tensor(neighbors)]).flatten(1)


def merging(features, scores, kept, geometry, weights):
    relative = torch.from_numpy(geometry.relative[kept]).to(features.dtype)
    slots = slot_weights(relative, geometry.valid[kept], subset(weights, "weight_net"))
    merged = merge_neighborhoods(features, scores, geometry.neighbors[kept], slots)
    return linear(layer_norm(merged, subset(weights, "norm")), subset(weights, "linear"))


def patch_embedding(image, weights):
    conv1, conv2, norm = (subset(weights, part) for part in ("conv1", "conv2", "batch_norm"))
    x = functional.conv2d(image[None], conv1["weight"], conv1["bias"], stride=2, padding=1)
    statistics = norm["running_mean"], norm["running_var"]
    x = functional.gelu(functional.batch_norm(x, *statistics, norm["weight"], norm["bias"], eps=EPSILON))
    x = functional.conv2d(x, conv2["weight"], conv2["bias"], stride=2, padding=1)
    return layer_norm(x[0].flatten(1).T, subset(weights, "norm"))
