"""The compiled CPU path of reading places: numbers and every gradient, the look-up by rounded cells, equal bits."""

import pytest
import torch

from fast import deformable
from fast.ops import dispatch
from fast.ops.sampling import cpu, plain
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
    """Arguments of ``cpu.sample_levels``, and of ``cpu.forward`` for the same; the deepest level has three tokens.

    Places lie at quarters of a cell, where rounding ties, on tokens, and far beyond the grid.
    """
    torch.manual_seed(0)
    (h, w), sizes, heads, points = GRID, [3, 10, 60], 2, 4
    cells = torch.cat([torch.stack([torch.randperm(h * w)[:n] for _ in range(2)]) for n in sizes], dim=1)
    positions = torch.stack([cells % w, cells // w], dim=-1)
    tables = deformable.lookup_tables(positions.split(sizes, dim=1), GRID)
    offsets = torch.randint(-60, 61, (2, sum(sizes), heads, len(sizes), points, 2)) / 4
    locations = (positions[:, :, None, None, None] + offsets).to(dtype)
    attention = torch.randn(locations.shape[:-1], dtype=dtype)
    values, half_power = torch.randn(2, sum(sizes), heads, 32, dtype=dtype), torch.tensor([2.7], dtype=dtype)
    nearest = plain.nearest_of_levels(locations, tables, GRID).flatten(3, 4)
    levels = locations, attention, tables, positions, values, half_power, GRID
    return levels, (locations.flatten(3, 4), attention.flatten(3, 4), positions, values, nearest, half_power)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rounded_look_up_reads_the_same_tokens_and_has_the_same_gradients(dtype):
    levels, places = levels_setting(dtype)
    assert (places[4] < 0).any() and (places[4] >= 0).any()
    out = cpu.sample_levels(*levels)
    assert out.dtype == dtype and torch.equal(out, cpu.forward(*places))
    grad_out = torch.randn_like(out)
    got, expected = cpu.sample_levels_backward(grad_out, *levels), cpu.backward(grad_out, *places)
    assert got[0].shape == levels[0].shape and got[1].shape == levels[1].shape
    assert all(torch.equal(x.flatten(), y.flatten()) for x, y in zip(got, expected, strict=True))


def test_locations_that_are_no_numbers_read_no_foreign_memory_and_show():
    levels, _ = levels_setting()
    locations = levels[0]
    locations[0, 5, 1, 2, 3] = torch.tensor([torch.nan, torch.inf])
    out = cpu.sample_levels(*levels)
    assert out[0, 5, 1].isnan().all() and out.isnan().sum() == 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_same_bits_for_any_number_of_threads(dtype):
    inputs, levels = arguments_of(MANY, dtype), levels_setting(dtype)[0]
    grads = torch.randn(2, 150, 3, 40, dtype=dtype), torch.randn(2, 73, 2, 32, dtype=dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append([cpu.forward(*inputs), *cpu.backward(grads[0], *inputs)])
        results[-1] += [cpu.sample_levels(*levels), *cpu.sample_levels_backward(grads[1], *levels)]
    torch.set_num_threads(1)
    assert all(torch.equal(x, y) for more in results[1:] for x, y in zip(results[0], more, strict=True))
