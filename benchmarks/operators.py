"""Operators, ready to be timed: on tokens as a network with random scores keeps them, with AFF-Tiny's channels."""

import torch

from fast.clustering import cluster_order, cluster_sums
from fast.deformable import DeformableAttention, lookup_table, lookup_tables
from fast.grid_prior import grid_prior, local_stride, reserved_tokens
from fast.merging import Merging
from fast.models import model_config
from fast.neighborhoods import nearest_clusters, stage_geometry
from fast.ops import dispatch, neighborhood_attention
from fast.ops.indexing import gather_rows
from fast.patch_embedding import grid_positions
from fast.selection import choose, token_counts

from .cases import BACKWARD

CONFIG = model_config("aff_tiny")
NEAREST = 6  # clusters that make a neighbourhood of 48
HIDDEN, HEADS, POINTS = 256, 8, 4  # of Mask2Former's encoder
SWITCH = {"attention": "attention", "merging": "merging", "deformable reading": "sampling"}  # else "nearest"


def has_plain_rival(case, device):
    """Whether a case takes another path than the plainest on a device."""
    switch = SWITCH.get(case.what, "nearest")
    return case.group == "model" or dispatch.path(switch, device) != dispatch.PATHS[switch][-1]


def tokens(grid_size, stage, batch, device):
    """Return positions (B, n, 2) of a stage's tokens where scores are random."""
    generator = torch.Generator().manual_seed(0)
    counts = token_counts(grid_size, CONFIG.rate)
    positions = grid_positions(grid_size).repeat(batch, 1, 1)
    for merge in range(1, stage):
        scores = torch.rand(positions.shape[:2], generator=generator)
        prior, reserved = grid_prior(positions, local_stride(positions)), reserved_tokens(positions, merge)
        positions = gather_rows(positions, choose(scores, prior, reserved, counts[merge], CONFIG.alpha))
    return positions.to(device)


def prepare(case, device):
    """Return a function that runs an operator once.

    Parameters
    ----------
    case : Case
        Of group "operator".
    device : torch.device
    """
    grid_size = tuple(side // 4 for side in case.size)
    if case.what == "deformable reading":
        return _deformable(case, grid_size, device)
    positions = tokens(grid_size, case.stage, case.batch, device)
    if case.what == "nearest clusters":
        order = cluster_order(positions, CONFIG.cluster_size, grid_size)[0]
        sums, counts = cluster_sums(positions, order, CONFIG.cluster_size)
        return lambda: nearest_clusters(positions, sums, counts, NEAREST)
    if case.what == "nearest tokens":
        return lambda: lookup_table(positions, grid_size)
    if case.what == "local stride":
        return lambda: local_stride(positions)
    if case.what == "stage geometry":
        shared = positions[:1] if case.stage == 1 else positions  # all images share the full grid
        return lambda: _geometry(shared, case.stage, grid_size)
    geometry = _geometry(positions[:1] if case.stage == 1 else positions, case.stage, grid_size)
    return {"attention": _attention, "merging": _merging}[case.what](case, geometry, positions, device)


def attention_flops(case):
    """Count floating-point operations of attention's products (Eq. 2 and 3), two for a multiply-add.

    Each pair of a query and a neighbour needs, in each head, d multiply-adds for the weight and d for the sum; going
    back, d for the weight once more and for the gradients of weight, query, key and value. Softmax and position bias,
    under a tenth of it, are left out.
    """
    stage = case.stage - 1
    counts = token_counts(tuple(side // 4 for side in case.size), CONFIG.rate)
    pairs = case.batch * counts[stage] * min(counts[stage], CONFIG.neighborhood[stage])
    return 2 * pairs * CONFIG.dims[stage] * (7 if case.task == BACKWARD else 2)


def _geometry(positions, stage, grid_size):
    return stage_geometry(positions, CONFIG.cluster_size, CONFIG.neighborhood[stage - 1], grid_size)


def _normal(device, dtype, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(device, dtype).requires_grad_()


def _attention(case, geometry, positions, device):
    """Return attention without the linear layers around it, which are the same on every path."""
    dim, heads, dtype = CONFIG.dims[case.stage - 1], CONFIG.heads[case.stage - 1], getattr(torch, case.dtype)
    rows, d = (*positions.shape[:2], heads), dim // heads
    query, kv, blank = (_normal(device, dtype, *s) for s in ((*rows, d), (*rows, 2, d), (heads, 2, d)))
    weight, bias = (_normal(device, torch.float32, *shape) for shape in ((heads, 5), (heads,)))
    weight = (0.02 * weight.detach()).requires_grad_()  # as a network begins
    query, kv = (geometry.to_clusters(x.detach()).requires_grad_() for x in (query, kv))
    geometry = geometry.renumbered()
    inputs = [query, kv, blank, weight, bias]
    return _run(case, lambda: neighborhood_attention(*inputs, geometry), inputs)


def _merging(case, geometry, positions, device):
    dim, counts = CONFIG.dims[case.stage - 1], token_counts(tuple(side // 4 for side in case.size), CONFIG.rate)
    module = Merging(dim, CONFIG.dims[case.stage]).to(device)
    features = _normal(device, getattr(torch, case.dtype), *positions.shape[:2], dim)
    scores = _normal(device, torch.float32, *positions.shape[:2]).detach().sigmoid().requires_grad_()
    kept = scores.detach().argsort(dim=1)[:, : counts[case.stage]].sort(dim=1).values

    def merge():
        with torch.autocast(device.type, torch.bfloat16, enabled=case.dtype == "bfloat16"):
            return module(features, scores, kept, geometry)

    return _run(case, merge, [features, scores, *module.parameters()])


def _deformable(case, grid_size, device):
    levels = [tokens(grid_size, stage, case.batch, device) for stage in (4, 3, 2)]
    tables, sizes = lookup_tables(levels, grid_size), [level.shape[1] for level in levels]
    positions = torch.cat(levels, dim=1)
    module = DeformableAttention(HIDDEN, HEADS, len(levels), POINTS).to(device)
    query, source = (_normal(device, torch.float32, *positions.shape[:2], HIDDEN) for _ in range(2))
    inputs = [query, source, *module.parameters()]
    return _run(case, lambda: module(query, positions, source, sizes, grid_size, tables), inputs)


def _run(case, forward, inputs):
    """Return a function of no arguments: the forward pass alone, or with the gradients of all inputs."""

    def alone():
        with torch.no_grad():
            forward()

    def with_gradients():
        torch.autograd.grad(forward().float().square().mean(), inputs)

    return with_gradients if case.task == BACKWARD else alone
