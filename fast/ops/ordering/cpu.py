"""Launcher of the compiled CPU kernels of cluster order and choice (``cpu.cpp``)."""

import torch

from ..native import call

SOURCE = "ordering/cpu.cpp"


def cluster_tokens(positions, ranks, cluster_size, grid_size):
    """Cut the tokens, in the order of Eq. 1, into clusters.

    Parameters
    ----------
    positions : (B, n, 2) int64 tensor
    ranks : (nh, nw) int64 tensor
        Of the patches along a curve: 0 ... nh nw - 1, each once.
    cluster_size : int
        m.
    grid_size : (h, w)

    Returns
    -------
    order, cluster, place, members, sums
        Of ``Clusters``.

    Raises
    ------
    ValueError
        Tokens off the grid.
    """
    positions, ranks = positions.detach().long().contiguous(), ranks.contiguous()
    (batch, n), k = positions.shape[:2], -(-positions.shape[1] // cluster_size)
    order, cluster, place = (positions.new_empty(batch, n) for _ in range(3))
    members, sums = positions.new_empty(batch, k, cluster_size), positions.new_empty(batch, k, 2)
    outside = positions.new_zeros(1)  # how many tokens are off the grid: the kernel stops then
    results = order, cluster, place, members, sums
    sizes = batch, n, cluster_size, *grid_size, *ranks.shape
    call(SOURCE, "cluster_tokens", positions, ranks, *results, outside, *sizes)
    if outside.item():
        raise ValueError(f"positions: {outside.item()} tokens are off the grid h, w = {grid_size[0]}, {grid_size[1]}")
    return results


def choose(value, keep):
    """Indices (B, K), ascending, of the ``keep`` largest of float64 values (B, n); of equal ones the first."""
    value = value.detach().double().contiguous()
    kept = value.new_empty(len(value), keep, dtype=torch.int64)
    call(SOURCE, "choose", value, kept, *value.shape, keep)
    return kept
