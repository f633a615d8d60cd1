"""Neighbour lists read from the other end: every slot in its token's list, in order; sums of rows without atomics."""

import numpy as np
import pytest
import torch

from fast.ops.csr import scatter_rows, transpose
from parity_tests.gradients import assert_gradcheck

SIZES = {  # batch, queries, slots, tokens
    "some": (3, 9, 4, 11),
    "one_token": (2, 5, 3, 1),
    "more_tokens_than_slots": (2, 2, 3, 40),
    "no_image": (0, 4, 3, 5),
    "no_query": (2, 0, 3, 5),
    "no_slot": (2, 4, 0, 5),
}


def lists(name, dtype=torch.int64, empty=True):
    """Random neighbour lists (B, q, M), a third of the slots empty, and n."""
    batch, queries, slots, n = SIZES[name]
    rng = np.random.default_rng(len(name))
    neighbors = rng.integers(0, n, (batch, queries, slots))
    if empty:
        neighbors[rng.random(neighbors.shape) < 0.33] = -1
    return torch.from_numpy(neighbors).to(dtype), n


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("empty", [True, False], ids=["with_empty_slots", "full"])
@pytest.mark.parametrize("name", SIZES)
def test_each_token_lists_the_slots_that_name_it_in_order(name, empty, dtype, device):
    neighbors, n = lists(name, dtype, empty)
    offsets, entries = (x.cpu().numpy() for x in transpose(neighbors.to(device), n))
    assert offsets.shape == (len(neighbors), n + 1) and entries.shape == (
        len(neighbors),
        neighbors[:1].flatten(1).shape[1],
    )
    for flat, start, order in zip(neighbors.flatten(1).numpy(), offsets, entries, strict=True):
        expected = [np.flatnonzero(flat == token) for token in range(n)] + [np.flatnonzero(flat < 0)]
        assert order.tolist() == np.concatenate(expected).tolist()
        assert start.tolist() == np.cumsum([0, *map(len, expected[:-1])]).tolist()


def test_strides_do_not_matter():
    neighbors, n = lists("some")
    turned = neighbors.transpose(1, 2).contiguous().transpose(1, 2)
    assert not turned.is_contiguous()
    for got, expected in zip(transpose(turned, n), transpose(neighbors, n), strict=True):
        assert torch.equal(got, expected)


def test_many_images_take_wider_keys():
    """More keys than int32 holds: two images of 2^30 tokens, of which the last is named."""
    n = 2**30
    neighbors = torch.tensor([[[n - 1, -1]], [[0, n - 1]]])
    keys = {}

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "sort" in str(function):
                keys["sorted"] = args[0].clone()
                raise StopIteration
            return function(*args, **(kwargs or {}))

    with Seen(), pytest.raises(StopIteration):
        transpose(neighbors, n)
    assert keys["sorted"].tolist() == [n - 1, n, n + 1, 2 * n]


@pytest.mark.parametrize("name", SIZES)
def test_scatter_rows_adds_up_what_names_a_token(name, device):
    neighbors, n = lists(name)
    rows = torch.from_numpy(np.random.default_rng(1).integers(-9, 9, (*neighbors.flatten(1).shape, 3))).double()
    rows[neighbors.flatten(1) < 0] = torch.nan  # left out, not multiplied by 0
    got = scatter_rows(rows.to(device), *transpose(neighbors.to(device), n)).cpu()
    expected = torch.zeros(len(neighbors), n, 3, dtype=torch.float64)
    for image, flat in enumerate(neighbors.flatten(1)):
        expected[image].index_add_(0, flat[flat >= 0], rows[image][flat >= 0])
    assert torch.equal(got, expected)


def test_scatter_rows_gradcheck():
    neighbors, n = lists("some")
    index = transpose(neighbors, n)
    assert_gradcheck(lambda rows: scatter_rows(rows, *index), torch.randn(3, 36, 2))


def test_scatter_rows_gives_the_same_bits_again_and_without_batch_mates(device):
    neighbors, n = (x.to(device) if torch.is_tensor(x) else x for x in lists("some"))
    rows = torch.randn(3, 36, 5, device=device)
    whole = scatter_rows(rows, *transpose(neighbors, n))
    assert torch.equal(whole, scatter_rows(rows, *transpose(neighbors, n)))
    for i in range(3):
        assert torch.equal(whole[i], scatter_rows(rows[[i]], *transpose(neighbors[[i]], n))[0])
