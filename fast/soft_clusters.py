"""Soft clusters between a stage's tokens and the merged ones (Suzuki, HCFormer, arXiv 2205.09949, on points)."""

import torch
from torch import nn

from .checks import check_arrays, check_indices
from .neighborhoods import nearest_tokens
from .ops import apply_linear
from .ops.indexing import gather_rows

CANDIDATES = 9  # merged tokens that a fine token may belong to
EMBEDDING = 128  # channels in which tokens are compared
SMALL = 1e-8  # keeps the temperature and the norms away from zero


class SoftAssignment(nn.Module):
    """How much each fine token belongs to each of its nearest merged tokens, by cosine similarity."""

    def __init__(self, fine_dim, coarse_dim):
        super().__init__()
        self.coarse_norm = nn.LayerNorm(coarse_dim)
        self.fine = nn.Linear(fine_dim, EMBEDDING, bias=False)
        self.coarse = nn.Linear(coarse_dim, EMBEDDING, bias=False)
        self.temperature = nn.Parameter(torch.full((1,), 0.1))

    def forward(self, fine_positions, fine, coarse_positions, coarse, grid_size):
        """Fine tokens (B, n, ...) and merged ones (B, K, ...) -> candidates (B, n, 9) int64, assignment (B, n, 9).

        Fine features come with the stage's layer norm. Candidates are the nearest merged tokens (L2, ties in raster
        order), all of them if there are fewer.
        """
        candidates = nearest_tokens(fine_positions, coarse_positions, CANDIDATES, grid_size)
        a = nn.functional.normalize(apply_linear(self.fine, fine), dim=-1, eps=SMALL)
        b = nn.functional.normalize(apply_linear(self.coarse, self.coarse_norm(coarse)), dim=-1, eps=SMALL)
        cosine = (gather_rows(b, candidates) @ a[..., None]).squeeze(-1)
        cosine = cosine.to(torch.promote_types(cosine.dtype, torch.float32))
        return candidates, (cosine / (self.temperature.abs() + SMALL)).softmax(dim=-1)


def decode_clusters(values, candidates, assignment):
    """Lift values of the merged tokens (B, K, V) to the fine tokens: x_i = sum_j A_ij x_j -> (B, n, V)."""
    check_arrays(
        values=(values, "real", "B K V"),
        candidates=(candidates, "whole", "B n k"),
        assignment=(assignment, "real", "B n k"),
    )
    check_indices("candidates", candidates, values.shape[1])
    return (assignment[:, :, None].to(values.dtype) @ gather_rows(values, candidates)).squeeze(2)
