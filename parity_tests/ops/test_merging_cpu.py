"""The compiled CPU path of merging: numbers and every gradient, and the same bits for any number of threads."""

import pytest
import torch

from fast.ops.merging import cpu
from parity_tests.cases import DTYPES
from parity_tests.ops import test_merging as operator
from parity_tests.ops.test_merging import LARGE, LETTERS, Sizes, tensors_for

MANY = Sizes("many_blocks", 200, 130, 9, 20, batch=2)  # of several pieces that threads share
CASES = [MANY, Sizes("every_width_of_vector", 40, 17, 12, 125)]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(operator, "DEVICE", "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_result_and_every_gradient_agree(sizes, dtype):
    torch.manual_seed(0)
    operator.check(sizes, dtype, "cpu")


def test_result_and_every_gradient_agree_at_full_size():
    torch.manual_seed(0)
    operator.check(LARGE[1], torch.float32, "cpu")


def arguments(sizes, dtype=torch.float32):
    """Of ``cpu.forward``."""
    inputs, indices = tensors_for(sizes, dtype, "cpu")
    matrix = torch.cat([inputs[LETTERS[0]].T, *(inputs[name][None] for name in LETTERS[1:])])
    return inputs["features"], inputs.get("scores"), *indices, matrix, sizes.sign


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_same_bits_for_any_number_of_threads(dtype):
    inputs = arguments(MANY, dtype)
    grad_out = torch.randn(2, 130, 80, dtype=dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append((cpu.forward(*inputs), *cpu.backward(grad_out, *inputs)))
    torch.set_num_threads(1)
    assert all(torch.equal(x, y) for more in results[1:] for x, y in zip(results[0], more, strict=True))


def test_slices_of_the_centres_give_slices_of_the_result():
    features, scores, positions, kept, neighbors, *rest = arguments(MANY)
    whole = cpu.forward(features, scores, positions, kept, neighbors, *rest)
    for part in (slice(0, 1), slice(17, 101), slice(101, 130)):
        assert torch.equal(
            cpu.forward(features, scores, positions, kept[:, part], neighbors[:, part], *rest), whole[:, part]
        )


def test_what_is_not_a_number_reaches_those_who_read_it_alone():
    features, *rest = arguments(MANY)
    neighbors = rest[3]
    features[0, 7] = torch.nan
    out = cpu.forward(features, *rest)
    reads = (neighbors == 7).any(dim=2) & (torch.arange(2) == 0)[:, None]
    assert torch.equal(out.isnan().any(dim=2), reads) and 0 < reads.sum() < reads.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_are_exact_from_one_tail_of_gelu_to_the_other(dtype):
    """Of two tokens far and near, with the norm's gain and bias spread over -20 .. 20."""
    one = torch.ones(1, 2, 1, dtype=dtype)
    positions = torch.tensor([[[0, 0], [3, -4]]])
    kept, neighbors = torch.tensor([[0]]), torch.tensor([[[1]]])
    matrix = torch.randn(8, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for x in torch.arange(-20, 20.5, 0.5):
        matrix[6:] = torch.stack([torch.zeros(4), x + torch.arange(4) / 9]).to(dtype)
        got = cpu.forward(one, None, positions, kept, neighbors, matrix, 1)[0, 0]
        exact = matrix[7].double() * torch.erfc(-matrix[7].double() / 2**0.5) / 2
        rtol, atol = (2e-5, 1e-29) if dtype == torch.float32 else (1e-12, 1e-300)
        torch.testing.assert_close(got.double(), exact, rtol=rtol, atol=atol)
