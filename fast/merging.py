"""Neighbourhood merging (paper sec. 3.3.1, Eq. 4)."""

import torch
from torch import nn

from .neighborhoods import gather_rows, token_slices

MID_CHANNELS = 4  # weights a slot


def merge_neighborhoods(features, scores, neighbors, slots):
    """Sum the neighbourhood of every kept token: vec( sum_j s_j W_j f_j^T ).

    Parameters
    ----------
    features : (B, n, C) tensor
    scores : (B, n) tensor
        s; every token of a neighbourhood gets gradient through it.
    neighbors : (B, K, M) int64 tensor
    slots : (B, K, M, 4) tensor
        W, 0 in empty slots.

    Returns
    -------
    (B, K, 4 C) tensor
        Laid out as [4][C].
    """
    weighted = features * scores[..., None]
    slots = slots.to(weighted.dtype).transpose(2, 3)  # (B, K, 4, M)
    parts = token_slices(neighbors, features.shape[0] * features.shape[2])
    return torch.cat([(slots[:, part] @ gather_rows(weighted, neighbors[:, part])).flatten(2) for part in parts], dim=1)


def weight_network():
    """The network W of Eq. 4: five numbers of a relative position -> four weights."""
    return nn.Sequential(nn.Linear(5, MID_CHANNELS), nn.LayerNorm(MID_CHANNELS), nn.GELU())


class Merging(nn.Module):
    """Merge the neighbourhoods of the kept tokens and map 4 x ``dim`` to ``out_dim`` channels."""

    def __init__(self, dim, out_dim):
        super().__init__()
        self.weight_net = weight_network()
        self.norm = nn.LayerNorm(MID_CHANNELS * dim)
        self.linear = nn.Linear(MID_CHANNELS * dim, out_dim)

    def forward(self, features, scores, kept, geometry):
        """features (B, n, C), scores (B, n), kept (B, K), StageGeometry -> (B, K, C')."""
        batch = len(features)
        neighbors = gather_rows(geometry.neighbors.expand(batch, -1, -1), kept)
        slots = self.slot_weights(geometry.relative_of(kept))
        if geometry.valid is not None:
            valid = gather_rows(geometry.valid.expand(batch, -1, -1), kept)
            slots = slots.masked_fill(~valid[..., None], 0)
        merged = merge_neighborhoods(features, scores, neighbors, slots)
        return self.linear(self.norm(merged.to(self.norm.weight.dtype)))  # in low precision, scores are still float32

    def slot_weights(self, relative):
        """W of Eq. 4, from relative positions (B, K, M, 5), in at least float32 also under autocast."""
        with torch.autocast(relative.device.type, enabled=False):
            return self.weight_net(relative.to(self.weight_net[0].weight.dtype))
