"""Multi-scale deformable attention on points (paper sec. 4.1; Zhu et al., Deformable DETR, eq. 3), batched."""

import math

import torch
from torch import nn

from . import ops
from .checks import check_arrays, check_choice, shown
from .interpolation import HALF_POWER
from .neighborhoods import nearest_tokens
from .ops.sampling.plain import nearest_by_table
from .patch_embedding import grid_positions

NEAREST = 4  # tokens that a value is interpolated from
LOOKUPS = ("rounded", "exact")

__all__ = ["LOOKUPS", "DeformableAttention", "lookup_table", "lookup_tables", "nearest_by_table", "nearest_exact"]


def lookup_table(positions, grid_size):
    """Return the nearest 4 tokens of every cell of the grid: positions (B, n, 2) -> (B, h w, 4) int64."""
    check_arrays(positions=(positions, "whole", "B n 2"))
    cells = grid_positions(grid_size, positions.device).expand(positions.shape[0], -1, -1)
    return nearest_tokens(cells, positions, NEAREST, grid_size)


def lookup_tables(level_positions, grid_size):
    """Return the nearest 4 tokens of every cell in each level: list of (B, n, 2) -> (L, B, h w, 4) int32.

    Tokens are numbered over all levels, one after the other; -1 where a level has fewer than four. Made once, they
    serve all layers.
    """
    if not isinstance(level_positions, tuple | list) or not level_positions:
        raise TypeError(f"level_positions must be a list of tensors, not {shown(type(level_positions).__name__)}")
    check_arrays(**{f"positions {i}": (each, "whole", f"B n{i} 2") for i, each in enumerate(level_positions)})
    tables, start = [], 0
    for positions in level_positions:
        table = (lookup_table(positions, grid_size) + start).int()
        tables.append(nn.functional.pad(table, (0, NEAREST - table.shape[-1]), value=-1))
        start += positions.shape[1]
    return torch.stack(tables)


def nearest_exact(sampling_locations, positions):
    """Find the tokens that really are nearest to locations (B, q, P, 2): -> (B, q, P, 4), ties in raster order."""
    check_arrays(sampling_locations=(sampling_locations, "real or whole", "B q P 2"))
    flat = sampling_locations.detach().flatten(1, 2)
    return nearest_tokens(flat, positions, NEAREST).unflatten(1, sampling_locations.shape[1:3])


class DeformableAttention(nn.Module):
    """Each token reads a few locations of every level, chosen by it, by Shepard interpolation of the level's tokens.

    Parameters
    ----------
    dim, heads, levels, points : int
        ``points`` locations a head and level.
    lookup : {"rounded", "exact"}
        How a location's four tokens are found; their weights always use the true location.
    """

    def __init__(self, dim, heads, levels, points, lookup="rounded"):
        super().__init__()
        check_choice("lookup", lookup, LOOKUPS)
        self.heads, self.levels, self.points, self.lookup = heads, levels, points, lookup
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)  # [head][level][point][x, y], in cells
        self.attention_weights = nn.Linear(dim, heads * levels * points)  # [head][level][point]
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        self.shepard_power = nn.Parameter(torch.full((1,), HALF_POWER))  # half the power
        self.reset_parameters()

    def reset_parameters(self):
        """Start with offsets in as many directions as heads, 1 to ``points`` cells away, and equal attention."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        radius = torch.arange(1, self.points + 1.0)
        offsets = (direction[:, None, None] * radius[:, None]).expand(-1, self.levels, -1, -1)
        with torch.no_grad():
            self.sampling_offsets.weight.zero_()
            self.sampling_offsets.bias.copy_(offsets.flatten())
            self.attention_weights.weight.zero_()
            self.attention_weights.bias.zero_()

    def forward(self, query, positions, source, level_sizes, grid_size, tables, add=None):
        """Attend to sampled locations of all levels.

        Parameters
        ----------
        query, source : (B, n, D) tensors
            The tokens of all levels, one level after the other, with and without their position code.
        positions : (B, n, 2) int64 tensor
        level_sizes : sequence of int
        grid_size : (h, w)
        tables : (L, B, h w, 4) int32 tensor
            Of ``lookup_tables``; read if ``lookup`` is "rounded".
        add : (B, n, D) tensor, optional
            What is added to the result.

        Returns
        -------
        (B, n, D) tensor
        """
        shape = (self.heads, self.levels, self.points)
        offsets = ops.apply_linear(self.sampling_offsets, query).unflatten(-1, (*shape, 2))
        logits = ops.apply_linear(self.attention_weights, query).unflatten(-1, shape)
        values = ops.apply_linear(self.value, source).unflatten(-1, (self.heads, -1))
        if self.lookup == "rounded":
            out = ops.sample_levels(offsets, logits, tables, positions, values, self.shepard_power, grid_size)
        else:
            sampling_locations = positions[:, :, None, None, None] + offsets
            nearest = self._nearest_exact(sampling_locations, positions, level_sizes)
            flat = sampling_locations.flatten(3, 4), logits.flatten(3).softmax(dim=-1)
            out = ops.sample(*flat, positions, values, nearest, self.shepard_power)
        return ops.apply_linear(self.output, out.flatten(2), add=add)

    def _nearest_exact(self, sampling_locations, positions, level_sizes):
        """Nearest tokens of locations (B, n, H, L, P, 2), numbered over all levels: (B, n, H, L P, 4) int64.

        -1 where a level has fewer than four.
        """
        found, start = [], 0
        for level, level_positions in enumerate(positions.split(level_sizes, dim=1)):
            nearest = nearest_exact(sampling_locations[:, :, :, level].flatten(2, 3), level_positions) + start
            nearest = nn.functional.pad(nearest, (0, NEAREST - nearest.shape[-1]), value=-1)
            found.append(nearest.unflatten(2, (self.heads, -1)))
            start += level_positions.shape[1]
        return torch.cat(found, dim=3)
