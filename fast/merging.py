"""Neighbourhood merging (paper sec. 3.3.1, Eq. 4)."""

from torch import nn

from . import ops
from .ops.merging.plain import MID_CHANNELS, merge_neighborhoods, slot_weights
from .position import PositionLinear

__all__ = ["Merging", "merge_neighborhoods", "slot_weights", "weight_network"]


def weight_network():
    """The network W of Eq. 4: five numbers of a relative position -> four weights."""
    return nn.Sequential(PositionLinear(5, MID_CHANNELS), nn.LayerNorm(MID_CHANNELS), nn.GELU())


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
        parameters = ops.parameter_matrix(self.weight_net)
        merged = ops.merge(features, scores, geometry.positions, kept, neighbors, parameters)
        merged = merged.to(self.norm.weight.dtype)  # in low precision, scores are still float32
        return ops.apply_linear(self.linear, self.norm(merged))
