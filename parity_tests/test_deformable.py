"""Deformable attention: how a location's tokens are found, to the last tie, and numbers and gradients of the whole."""

import numpy as np
import pytest
import torch

import fast.deformable
import reference.deformable
from fast.ops import dispatch
from parity_tests import plain_heads
from parity_tests.cases import DTYPES, SMALL
from parity_tests.compare import GRADIENT, assert_equal, assert_layers, assert_parity
from parity_tests.gradients import assert_directional, assert_gradcheck, backward, flat
from parity_tests.heads import level_positions
from parity_tests.weights import fill, tensors
from reference.neighborhoods import nearest_tokens
from reference.patch_embedding import grid_positions

HEADS, POINTS, DIM = 2, 3, 8
CANVASES = {"square": ((8, 8), 2), "wide": ((9, 14), 1), "one_deep_token": ((4, 4), 2), "thin": ((1, 17), 1)}


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_lookup_table_agrees(case, device):
    """Every cell's nearest four, against the search of all tokens in both twins."""
    positions = case.positions()
    expected = np.stack([reference.deformable.lookup_table(p, case.grid_size) for p in positions])
    assert (expected[0] == nearest_tokens(grid_positions(case.grid_size), positions[0], 4)).all()
    got = fast.deformable.lookup_table(torch.from_numpy(positions).to(device), case.grid_size)
    assert_equal(got, expected, name="lookup_table")


def test_lookup_tables_number_the_tokens_of_all_levels():
    levels = torch.tensor([[[1, 0], [0, 0]]]), torch.tensor([[[0, 0], [1, 0], [2, 0], [3, 0], [9, 0]]])
    tables = fast.deformable.lookup_tables(levels, (1, 3))
    assert tables.dtype == torch.int32 and tables.shape == (2, 1, 3, 4)
    assert tables[:, 0].tolist() == [
        [[1, 0, -1, -1], [0, 1, -1, -1], [0, 1, -1, -1]],
        [[2, 3, 4, 5], [3, 2, 4, 5], [4, 3, 5, 2]],
    ]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_nearest_by_table_and_exact_agree(case, device):
    """At halves of a cell, where rounding ties, and far beyond the grid, where it clamps."""
    positions, (h, w) = case.positions(), case.grid_size
    sampling_locations = case.generator("locations").integers(-9, [2 * w + 9, 2 * h + 9], (case.batch, 25, 3, 2)) / 2
    tensors_of = [torch.from_numpy(x).to(device) for x in (sampling_locations, positions)]
    tables = [reference.deformable.lookup_table(p, case.grid_size) for p in positions]
    by_table = [
        reference.deformable.nearest_by_table(q, t, case.grid_size)
        for q, t in zip(sampling_locations, tables, strict=True)
    ]
    got = fast.deformable.nearest_by_table(tensors_of[0], torch.from_numpy(np.stack(tables)).to(device), case.grid_size)
    assert_equal(got, np.stack(by_table), name="nearest_by_table")
    exact = [reference.deformable.nearest_exact(q, p) for q, p in zip(sampling_locations, positions, strict=True)]
    assert_equal(fast.deformable.nearest_exact(*tensors_of), np.stack(exact), name="nearest_exact")


@pytest.mark.parametrize("twin", ["reference", "fast"])
def test_places_are_rounded_half_to_even_and_clamped(twin):
    sampling_locations = [(0.5, 0.5), (1.5, 0), (2.5, -0.5), (3.5, 2.5), (-7, 1), (99, 99), (-0.5, 1.49), (2.51, 1.51)]
    cells = [0, 2, 2, 11, 4, 11, 4, 11]  # of a grid of three rows of four
    table = np.arange(12)[:, None]
    if twin == "fast":
        sampling_locations = torch.tensor(sampling_locations)[None, :, None]
        found = fast.deformable.nearest_by_table(sampling_locations, torch.from_numpy(table)[None], (3, 4))[0, :, 0, 0]
    else:
        found = reference.deformable.nearest_by_table(np.array(sampling_locations), table, (3, 4))[:, 0]
    assert found.tolist() == cells


def setting(name, dtype=torch.float64, lookup="rounded", spread=1.0):
    """A module with its weights, and query, positions, source, level sizes of a batch; offsets ``spread`` cells."""
    grid_size, batch = CANVASES[name]
    deep = level_positions(grid_size, batch, seed=3)[:0:-1]
    positions, sizes = np.concatenate(deep, axis=1), [p.shape[1] for p in deep]
    module = fast.deformable.DeformableAttention(DIM, HEADS, len(deep), POINTS, lookup)
    fill(module, seed=1)
    with torch.no_grad():
        module.sampling_offsets.weight.mul_(spread)
    module = module.to(dtype)
    weights = {key: value.double().numpy() for key, value in module.state_dict().items()}
    rng = np.random.default_rng(2)
    query, source = (torch.from_numpy(x).to(dtype) for x in rng.standard_normal((2, *positions.shape[:2], DIM)))
    return module, weights, query, positions, source, sizes, grid_size


def run(module, query, positions, source, sizes, grid_size):
    positions = torch.from_numpy(positions).to(query.device)
    tables = fast.deformable.lookup_tables(positions.split(sizes, dim=1), grid_size)
    return module(query, positions, source, sizes, grid_size, tables)


def per_image(function, query, positions, source, *rest):
    return [function(*columns, *rest) for columns in zip(query, positions, source, strict=True)]


@pytest.mark.parametrize("lookup", fast.deformable.LOOKUPS)
@pytest.mark.parametrize("spread", [1.0, 8.0], ids=["near", "beyond_the_grid"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", CANVASES)
def test_twins_agree(name, dtype, spread, lookup, device):
    """Not in bfloat16: it has no digits for a location on a grid, so the pixel decoder runs in float32 (or wider)."""
    module, weights, query, positions, source, sizes, grid_size = setting(name, dtype, lookup, spread)
    with torch.no_grad():
        got = run(module.to(device), query.to(device), positions, source.to(device), sizes, grid_size)
    exact, rest = (query.double().numpy(), positions, source.double().numpy()), (sizes, grid_size)
    settings = HEADS, POINTS, lookup
    oracle = per_image(reference.deformable.deformable_attention, *exact, *rest, weights, *settings)
    low = tensors(weights, dtype)
    baseline = per_image(plain_heads.deformable_attention, query, positions, source, *rest, low, *settings)
    assert_parity(got, np.stack(oracle), torch.stack(baseline), dtype, name=f"deformable_attention {lookup}")


@pytest.mark.parametrize("lookup", fast.deformable.LOOKUPS)
@pytest.mark.parametrize("name", ["square", "thin"])
def test_gradients_agree_with_central_differences_of_the_reference(name, lookup):
    """Of everything but the power of locations on a token; the choice of tokens stands still under so small a step."""
    module, weights, query, positions, source, sizes, grid_size = setting(name, lookup=lookup)
    grad_out = torch.from_numpy(np.random.default_rng(4).standard_normal(query.shape))
    inputs = {"query": query, "source": source}
    gradients = backward(
        module, inputs, lambda i: run(module, i["query"], positions, i["source"], sizes, grid_size), grad_out
    )

    def output(i):
        rest = sizes, grid_size, i, HEADS, POINTS, lookup
        return np.stack(per_image(reference.deformable.deformable_attention, i["query"], positions, i["source"], *rest))

    at = {key: value.numpy() for key, value in inputs.items()} | weights
    assert_directional(gradients, output, at, grad_out.numpy(), name="deformable_attention gradient")


@pytest.mark.parametrize("name", CANVASES)
def test_every_element_of_the_gradients_agrees(name):
    dtype = torch.float32
    module, weights, query, positions, source, sizes, grid_size = setting(name, dtype)
    first = torch.from_numpy(np.random.default_rng(4).standard_normal(query.shape)).to(dtype)
    inputs = {"query": query, "source": source}

    def formula(i):
        rest = sizes, grid_size, i, HEADS, POINTS
        return torch.stack(per_image(plain_heads.deformable_attention, i["query"], positions, i["source"], *rest))

    def gradients(grad_out):
        def forward(i):
            return run(module, i["query"], positions, i["source"], sizes, grid_size)

        module.zero_grad()
        expected = [flat({**inputs, **tensors(weights, dtype)}, formula, grad_out, d) for d in (torch.float64, dtype)]
        return backward(module, inputs, forward, grad_out), *expected

    results = [gradients(first.roll(i, dims=1)) for i in range(6)]
    got, oracle, baseline = results[0]
    power = [[result[i]["shepard_power"] for result in results] for i in range(3)]
    got["shepard_power"] = torch.cat(power[0])  # one number each: a single baseline's error may be 0 by chance
    oracle["shepard_power"], baseline["shepard_power"] = map(np.concatenate, power[1:])
    assert_layers(got, oracle, baseline, dtype, GRADIENT, name="deformable_attention gradient")


def test_gradcheck():
    module, _, query, positions, source, sizes, grid_size = setting("one_deep_token")
    assert_gradcheck(lambda q, s: run(module, q, positions[:1], s, sizes, grid_size)[:, ::9], query[:1], source[:1])


@pytest.mark.parametrize("name", CANVASES)
def test_lookups_are_one_where_places_are_cells_of_the_grid(name):
    module, _, query, positions, source, sizes, grid_size = setting(name)
    with torch.no_grad():
        for parameter in module.sampling_offsets.parameters():
            parameter.zero_()
        results = []
        for lookup in fast.deformable.LOOKUPS:
            module.lookup = lookup
            results.append(run(module, query, positions, source, sizes, grid_size))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_offsets_start_in_eight_directions_one_to_four_cells_away():
    module = fast.deformable.DeformableAttention(16, 8, 3, 4)
    offsets = module.sampling_offsets(torch.randn(5, 16)).view(5, 8, 3, 4, 2)
    corners = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    expected = torch.tensor(corners)[:, None, None] * torch.arange(1, 5)[:, None]
    torch.testing.assert_close(offsets, expected.expand(5, 8, 3, 4, 2).float(), atol=1e-5, rtol=0)
    assert not module.attention_weights(torch.randn(2, 16)).any() and module.shepard_power.item() == 3


def test_result_does_not_depend_on_the_slices_nor_on_batch_mates(monkeypatch):
    module, _, query, positions, source, sizes, grid_size = setting("square")
    with torch.no_grad():
        whole = run(module, query, positions, source, sizes, grid_size)
        alone = [run(module, query[[i]], positions[[i]], source[[i]], sizes, grid_size) for i in range(2)]
        torch.testing.assert_close(torch.cat(alone), whole, rtol=1e-12, atol=1e-13)
        cuts = [slice(i, i + 5) for i in range(0, query.shape[1], 5)]
        monkeypatch.setattr(fast.ops.sampling.plain, "token_slices", lambda *_: cuts)
        with dispatch.force(sampling="plain"):
            sliced = run(module, query, positions, source, sizes, grid_size)
    torch.testing.assert_close(sliced, whole, rtol=1e-12, atol=1e-13)


def test_unknown_lookup_gets_the_same_error_from_both():
    with pytest.raises(ValueError, match="lookup must be.*rounded.*exact.*not 'bilinear'"):
        fast.deformable.DeformableAttention(8, 2, 3, 2, "bilinear")
    _, weights, query, positions, source, sizes, grid_size = setting("thin")
    columns = query[0].numpy(), positions[0], source[0].numpy(), sizes, grid_size
    with pytest.raises(ValueError, match="lookup must be.*rounded.*exact.*not 'bilinear'"):
        reference.deformable.deformable_attention(*columns, weights, HEADS, POINTS, "bilinear")
