"""Neighbourhood merging (paper sec. 3.3.1, Eq. 4)."""

import torch
from torch import nn

from .ops import dispatch
from .ops import merging as merging_operator
from .ops.indexing import gather_rows, recomputed, token_slices
from .position import relative_position

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
    return torch.cat([recomputed(_mix, weighted, neighbors[:, part], slots[:, part]) for part in parts], dim=1)


def _mix(weighted, neighbors, slots):
    """weighted (B, n, C), neighbors (B, K, M), slots (B, K, 4, M) -> (B, K, 4 C)."""
    return (slots @ gather_rows(weighted, neighbors)).flatten(2)


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
        neighbors = geometry.neighbors_of(kept)  # (B, K, M), -1 where a slot is empty
        if dispatch.path("merging", features.device) == "gather":
            merged = self._gather(features, scores, kept, neighbors, geometry)
        else:
            matrix = merging_operator.parameter_matrix(self.weight_net)
            merged = torch.ops.aff.merge(features, scores, geometry.positions, kept, neighbors, matrix)
        return self.linear(self.norm(merged.to(self.norm.weight.dtype)))  # in low precision, scores are still float32

    def _gather(self, features, scores, kept, neighbors, geometry):
        near, positions = neighbors.clamp(min=0), geometry.positions.expand(len(kept), -1, -1)
        offsets = gather_rows(positions, near) - gather_rows(positions, kept)[:, :, None]
        slots = self.slot_weights(relative_position(offsets, geometry.dtype))
        slots = slots.masked_fill((neighbors < 0)[..., None], 0)
        return merge_neighborhoods(features, scores, near, slots)

    def slot_weights(self, relative):
        """W of Eq. 4, from relative positions (B, K, M, 5), in at least float32 also under autocast."""
        with torch.autocast(relative.device.type, enabled=False):
            return self.weight_net(relative.to(self.weight_net[0].weight.dtype))
