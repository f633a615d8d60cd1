"""The compiled CPU path of reading places: numbers and every gradient, the look-up by rounded cells, equal bits."""

import pytest
import torch

from fast import deformable
from fast.ops import dispatch
from fast.ops.sampling import cpu, sample_levels
from parity_tests.ops import test_sampling as operator
from parity_tests.ops.test_sampling import SMALL, Sizes, tensors_for

MANY = Sizes("many_blocks", 150, 3, 5, 70, 40, batch=2, missing=True)  # of several pieces that threads share
CASES = [MANY, Sizes("every_width_of_vector", 6, 2, 3, 8, 125), Sizes("a_row_beyond_a_block", 2, 1, 200, 50, 5)]
GRID = (12, 9)  # h, w


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(operator, "DEVICE", "cpu")
    with dispatch.force(sampling="cpu"):
        yield


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_result_and_every_gradient_agree(sizes, dtype):
    torch.manual_seed(0)
    operator.check(sizes, dtype, "cpu")


@pytest.mark.parametrize("half_power", [1.0, 2.0, 3.0, 4.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_of_any_power(half_power, dtype, monkeypatch):
    def with_power(*arguments):
        inputs, indices = tensors_for(*arguments)
        return inputs | {"half_power": torch.tensor([half_power], dtype=dtype)}, indices

    torch.manual_seed(0)
    monkeypatch.setattr(operator, "tensors_for", with_power)
    operator.check(MANY, dtype, "cpu")


def test_a_power_that_float32_cannot_hold_still_picks_the_nearest():
    """(1000^2)^8 overflows; the nearest of the four tokens is read all the same, with finite gradients."""
    inputs, indices = tensors_for(SMALL[0], torch.float32, device="cpu")
    inputs |= {"half_power": torch.tensor([8.0]), "locations": inputs["locations"] + 1000}
    grad_out = torch.randn(2, 5, 2, 8, generator=torch.Generator().manual_seed(0))
    got = operator.gradients(operator.run, inputs, indices, grad_out)
    exact = operator.gradients(operator.plain, {name: x.double() for name, x in inputs.items()}, indices, grad_out)
    for name in ("out", "attention", "values"):
        torch.testing.assert_close(got[name].double(), exact[name], rtol=1e-3, atol=1e-3)
    assert all(g.isfinite().all() for g in got.values())


def arguments_of(sizes, dtype=torch.float32):
    """Of ``cpu.forward``."""
    inputs, indices = tensors_for(sizes, dtype, device="cpu")
    x = inputs | indices
    return x["locations"], x.get("attention"), x["positions"], x["values"], x["nearest"], x["half_power"]


def levels_setting(dtype=torch.float32):
    """Arguments of ``cpu.sample_levels``; the deepest level has three tokens.

    Places lie at quarters of a cell, where rounding ties, on tokens, and far beyond the grid; some logits are huge.
    """
    torch.manual_seed(0)
    (h, w), sizes, heads, points = GRID, [3, 10, 60], 2, 4
    cells = torch.cat([torch.stack([torch.randperm(h * w)[:n] for _ in range(2)]) for n in sizes], dim=1)
    positions = torch.stack([cells % w, cells // w], dim=-1)
    tables = deformable.lookup_tables(positions.split(sizes, dim=1), GRID)
    offsets = (torch.randint(-60, 61, (2, sum(sizes), heads, len(sizes), points, 2)) / 4).to(dtype)
    logits = torch.randn(offsets.shape[:-1], dtype=dtype)
    logits[1, 3] *= 1e4
    values, half_power = torch.randn(2, sum(sizes), heads, 32, dtype=dtype), torch.tensor([2.7], dtype=dtype)
    return offsets, logits, tables, positions, values, half_power, GRID


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_levels_are_read_as_the_definition_says_with_the_same_gradients(dtype):
    """In bfloat16, locations and attention have float32's digits all the same."""
    levels = levels_setting(dtype)
    promoted = torch.promote_types(dtype, torch.float32)
    wide = [levels[i].to(promoted, copy=True).requires_grad_() for i in (0, 1, 4, 5)]
    with dispatch.force(sampling="plain"):
        expected = sample_levels(*wide[:2], *levels[2:4], *wide[2:], GRID)
    grad_out = torch.randn_like(expected).to(dtype)
    expected_grads = torch.autograd.grad(expected, wide, grad_out.to(expected.dtype))
    out = cpu.sample_levels(*levels)
    assert out.dtype == dtype
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 1e-2}[dtype]
    for got, exact in zip(
        [out, *cpu.sample_levels_backward(grad_out, *levels)], [expected, *expected_grads], strict=True
    ):
        assert got.shape == exact.shape
        assert (got - exact).abs().amax() <= tolerance * exact.abs().amax()


def test_locations_that_are_no_numbers_read_no_foreign_memory_and_show():
    levels = levels_setting()
    levels[0][0, 5, 1, 2, 3] = torch.tensor([torch.nan, torch.inf])
    levels[1][1, 7, 0, 1, 2] = torch.nan
    out = cpu.sample_levels(*levels)
    assert out[0, 5, 1].isnan().all() and out[1, 7, 0].isnan().all() and out.isnan().sum() == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_same_bits_for_any_number_of_threads(dtype):
    inputs, levels = arguments_of(MANY, dtype), levels_setting(dtype)
    grads = torch.randn(2, 150, 3, 40, dtype=dtype), torch.randn(2, 73, 2, 32, dtype=dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append([cpu.forward(*inputs), *cpu.backward(grads[0], *inputs)])
        results[-1] += [cpu.sample_levels(*levels), *cpu.sample_levels_backward(grads[1], *levels)]
    torch.set_num_threads(1)
    assert all(torch.equal(x, y) for more in results[1:] for x, y in zip(results[0], more, strict=True))
