"""Neighbour lists read from the other end: for each token, which slots name it. Used by backward passes.

A sum over "all slots that read token t" needs no atomic additions then: the slots of a token stand in one piece, in a
fixed order, so the sum is the same at every run.
"""

import torch


def transpose(neighbors, n):
    """Sort the slots of neighbour lists by the token they name (compressed sparse rows).

    Parameters
    ----------
    neighbors : (B, q, M) integer tensor
        Token indices below n, negative in empty slots; not checked, which would make a GPU wait.
    n : int
        Tokens of each image.

    Returns
    -------
    offsets : (B, n + 1) int64 tensor
        Token t is named by ``entries[b, offsets[b, t]:offsets[b, t + 1]]``; the last offset counts the full slots.
    entries : (B, q M) int64 tensor
        Slot numbers, query * M + slot, ascending for each token; those of the empty slots come last.
    """
    batch, slots = len(neighbors), neighbors.shape[1] * neighbors.shape[2]
    image = torch.arange(batch, device=neighbors.device)[:, None]
    key_type = torch.int32 if batch * (n + 1) < 2**31 else torch.int64  # the shorter sorts faster
    first = (n + 1) * image  # one key for all images: they are sorted together
    keys = (torch.where(neighbors < 0, n, neighbors).reshape(batch, slots) + first).to(key_type)
    ascending, order = keys.flatten().sort(stable=True)
    tokens = (torch.arange(n + 1, device=keys.device) + first).to(key_type)
    offsets = torch.searchsorted(ascending, tokens.flatten()).view(batch, n + 1)
    return offsets - slots * image, order.view(batch, slots) - slots * image


def scatter_rows(rows, offsets, entries):
    """Add up, for each token, the rows of the slots that name it: no atomics, the same sum at every run.

    Parameters
    ----------
    rows : (B, q M, C) floating tensor
        A row for each slot.
    offsets, entries : tensors
        From ``transpose``.

    Returns
    -------
    (B, n, C) tensor
        0 for tokens that no slot names; rows of empty slots are left out.
    """
    batch, slots, channels = rows.shape
    image = torch.arange(batch, device=rows.device)[:, None]
    ordered = rows.flatten(0, 1).index_select(0, (entries + slots * image).flatten())
    if rows.numel() == 0:
        return rows.new_zeros(batch, offsets.shape[1] - 1, channels)
    # one list of all images: each image's empty slots are a segment of their own, dropped at the end
    lengths = torch.cat([offsets.diff(dim=1), slots - offsets[:, -1:]], dim=1).flatten()
    sums = torch.segment_reduce(ordered, "sum", lengths=lengths, axis=0, unsafe=True, initial=0)
    return sums.view(batch, -1, channels)[:, :-1].contiguous()
