"""PointConv, in place of a 3 x 3 convolution, over the nearest nine tokens (paper sec. 4.1, ref. [39])."""

import torch
from torch import nn

from . import ops
from .merging import MID_CHANNELS, weight_network
from .neighborhoods import nearest_tokens

NEAREST = 9
TOKENS_AT_ONCE = 2048  # without gradients


class PointConv(nn.Module):
    """Convolve tokens with weights that depend on relative position, then layer norm and linear: C -> C'.

    The relative position is that of the token seen from its neighbour, p_i - p_j, as the released weights expect.
    """

    def __init__(self, dim, out_dim):
        super().__init__()
        self.weight_net = weight_network()
        self.norm = nn.LayerNorm(MID_CHANNELS * dim)
        self.linear = nn.Linear(MID_CHANNELS * dim, out_dim)

    def forward(self, positions, features, grid_size):
        """positions (B, n, 2) int64 on the grid (h, w), features (B, n, C) -> (B, n, C')."""
        nearest = nearest_tokens(positions, positions, NEAREST, grid_size)
        itself = torch.arange(nearest.shape[1], device=nearest.device).expand(nearest.shape[0], -1)
        parameters = ops.parameter_matrix(self.weight_net)

        def convolve(part):
            mixed = ops.merge(features, None, positions, itself[:, part], nearest[:, part], parameters, -1)
            return ops.apply_linear(self.linear, self.norm(mixed))

        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return convolve(slice(None))
        parts = (slice(start, start + TOKENS_AT_ONCE) for start in range(0, max(1, nearest.shape[1]), TOKENS_AT_ONCE))
        return torch.cat([convolve(part) for part in parts], dim=1)  # the sums before the norm need not be kept
