"""Multi-scale deformable attention on points (paper sec. 4.1; Zhu et al., Deformable DETR, eq. 3), batched."""

import math

import torch
from torch import nn

from .interpolation import HALF_POWER, shepard_weights
from .neighborhoods import nearest_tokens
from .ops import dispatch
from .ops.indexing import gather_rows, recomputed, token_slices, weighted_sum
from .patch_embedding import grid_positions

NEAREST = 4  # tokens that a value is interpolated from
LOOKUPS = ("rounded", "exact")


def lookup_table(positions, canvas):
    """Return the nearest 4 tokens of every cell of the canvas: positions (B, n, 2) -> (B, h w, 4) int64."""
    cells = grid_positions(canvas, positions.device).expand(len(positions), -1, -1)
    return nearest_tokens(cells, positions, NEAREST, canvas)


def nearest_by_table(locations, table, canvas):
    """Look up the nearest tokens of locations (B, q, P, 2) at the cell they round to: -> (B, q, P, 4) int64.

    Rounded half to even and clamped to the canvas.
    """
    h, w = canvas
    x, y = locations.detach().round().long().unbind(-1)
    return gather_rows(table, y.clamp(0, h - 1) * w + x.clamp(0, w - 1))


def nearest_exact(locations, positions):
    """Find the tokens that really are nearest to locations (B, q, P, 2): -> (B, q, P, 4), ties in raster order."""
    flat = locations.detach().flatten(1, 2)
    return nearest_tokens(flat, positions, NEAREST).unflatten(1, locations.shape[1:3])


class DeformableAttention(nn.Module):
    """Each token reads a few places of every level, chosen by itself, by Shepard interpolation of the level's tokens.

    Parameters
    ----------
    dim, heads, levels, points : int
        ``points`` places a head and level.
    lookup : {"rounded", "exact"}
        How a place's four tokens are found; their weights always use the true place.
    """

    def __init__(self, dim, heads, levels, points, lookup="rounded"):
        super().__init__()
        if lookup not in LOOKUPS:
            raise ValueError(f"lookup must be one of {', '.join(LOOKUPS)}, not {lookup!r}")
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

    def forward(self, query, positions, source, level_sizes, canvas, tables):
        """Attend to sampled places of all levels.

        Parameters
        ----------
        query, source : (B, n, D) tensors
            The tokens of all levels, one level after the other, with and without their position code.
        positions : (B, n, 2) int64 tensor
        level_sizes : sequence of int
        canvas : (h, w)
        tables : list of (B, h w, 4) int64 tensors
            Of ``lookup_table``, one a level; read if ``lookup`` is "rounded".

        Returns
        -------
        (B, n, D) tensor
        """
        shape = (self.heads, self.levels, self.points)
        locations = positions[:, :, None, None, None] + self.sampling_offsets(query).unflatten(-1, (*shape, 2))
        attention = (
            self.attention_weights(query).unflatten(-1, (self.heads, -1)).softmax(dim=-1).unflatten(-1, shape[1:])
        )
        all_values = self.value(source).unflatten(-1, (self.heads, -1))
        values = all_values.split(level_sizes, dim=1)
        level_positions = positions.split(level_sizes, dim=1)
        if dispatch.path("interpolation", query.device) == "gather":
            out = 0
            for level, table in enumerate(tables):
                places, weight = locations[:, :, :, level], attention[:, :, :, level]
                out = out + self._read(places, weight, level_positions[level], values[level], table, canvas)
        else:
            nearest = self._nearest(locations.detach(), level_positions, tables, canvas).flatten(3, 4)
            places, weight = locations.flatten(3, 4), attention.flatten(3, 4)  # (B, n, H, L P, ..)
            out = torch.ops.aff.read_places(places, weight, positions, all_values, nearest, self.shepard_power)
        return self.output(out.flatten(2))

    def _nearest(self, locations, level_positions, tables, canvas):
        """Tokens that all places (B, n, H, L, P, 2) are read from, numbered over all levels: (B, n, H, L, P, 4) int32.

        -1 where a level has fewer than four.
        """
        found, start = [], 0
        for level, (positions, table) in enumerate(zip(level_positions, tables, strict=True)):
            places = locations[:, :, :, level].flatten(2, 3)
            if self.lookup == "rounded":
                nearest = nearest_by_table(places, table, canvas)
            else:
                nearest = nearest_exact(places, positions)
            nearest = (nearest + start).int().unflatten(2, (self.heads, -1))
            found.append(nn.functional.pad(nearest, (0, NEAREST - nearest.shape[-1]), value=-1))
            start += positions.shape[1]
        return torch.stack(found, dim=3)

    def _read(self, places, attention, positions, values, table, canvas):
        """Read one level: places (B, q, H, P, 2), attention (B, q, H, P), values (B, n, H, d) -> (B, q, H, d)."""
        values = values.permute(0, 2, 1, 3).flatten(0, 1)  # (B H, n, d)
        places, attention = (x.permute(0, 2, 1, 3, *range(4, x.ndim)) for x in (places, attention))  # (B, H, q, P, ..)
        slots = torch.empty(1, places.shape[2], self.points * NEAREST, device="meta")

        def read(location, attention, values, half_power):
            if self.lookup == "rounded":
                nearest = nearest_by_table(location, table, canvas)
            else:
                nearest = nearest_exact(location, positions)
            weight = shepard_weights(location, gather_rows(positions, nearest), half_power)
            weight = weight * attention[..., None]  # (B, H rows, P, 4)
            nearest, weight = (x.unflatten(1, (self.heads, -1)).flatten(0, 1).flatten(2) for x in (nearest, weight))
            return weighted_sum(weight, gather_rows(values, nearest))  # (B H, rows, d)

        out = []
        for part in token_slices(slots, len(values) * values.shape[-1]):
            here = (x[:, :, part].flatten(1, 2) for x in (places, attention))  # (B, H rows, P, ..)
            out.append(recomputed(read, *here, values, self.shepard_power))
        return torch.cat(out, dim=1).unflatten(0, (-1, self.heads)).transpose(1, 2)
