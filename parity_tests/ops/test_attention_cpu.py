"""The compiled CPU path of attention: its plan, every width of head, long lists, and the same bits for all threads.

``test_attention`` checks it on every case beside the other paths.
"""

import pytest
import torch

from fast.neighborhoods import stage_geometry
from fast.ops import dispatch
from fast.ops.attention import cpu
from parity_tests.cases import CASES, DTYPES, LOW, Case, case_named
from parity_tests.compare import GRADIENT, assert_equal, assert_layers, assert_parity
from parity_tests.ops.test_attention import by_definition, by_path, inputs_for, with_gradients

CHUNK = 32  # blocks that the kernels work on at a time
FAR = 2**40  # positions that float32 could not tell apart
LONG = Case("long_lists", (40, 40), 900, cluster_size=11, neighborhood=400, batch=2)
WIDTHS = [Case(f"heads_of_{d}", (9, 11), 61, dim=3 * d, heads=3) for d in (8, 16, 24, 32, 40, 48, 56, 64, 20, 1)]
ALL_SEEN = [
    Case(f"{n}_see_all", (24, 24), n, neighborhood=n, dim=16, batch=2) for n in (2, 7, 8, 9, 15, 17, 49, 255, 500)
]
MORE = [LONG, *WIDTHS, *ALL_SEEN]


@pytest.fixture(autouse=True)
def on_cpu():
    with dispatch.force(attention="cpu"):
        yield


@pytest.mark.parametrize("case", [*CASES, LONG], ids=str)
def test_the_plan_says_who_sees_whom(case):
    geometry = case.fast_geometry()
    plan, (images, k, m) = cpu.Plan(*geometry.plan.tensors), geometry.members.shape
    blocks = plan.there.shape[1]
    token = torch.full((images, 8 * blocks), -1)
    token[:, : k * m] = geometry.members.flatten(1)
    assert_equal(plan.there[..., None] >> torch.arange(8) & 1, (token >= 0).view(images, blocks, 8).long().numpy())
    for image in range(images):
        real = token[image] >= 0
        xy = geometry.positions[image][token[image].clamp(min=0)].where(real[:, None], 0)
        assert_equal(plan.cells[image].long(), xy.T.numpy())
        if k == 1:
            continue
        seen = torch.zeros(8 * blocks, 8 * blocks, dtype=torch.bool)
        for place in real.nonzero()[:, 0]:
            for cluster in geometry.nearest[image, token[image, place]]:
                seen[place, m * cluster : m * (cluster + 1)] = True
        seen &= real
        found = torch.zeros_like(seen)
        for block, (start, length) in enumerate(plan.lists[image].tolist()):
            entries = plan.seen[start : start + length]
            assert (entries.diff() > 0).all() and length <= plan.seen.numel() // (images * blocks)
            bits = plan.sees[start : start + length, None, None] >> torch.arange(64).view(8, 8) & 1
            for entry, bit in zip(entries.tolist(), bits.bool(), strict=True):
                found[8 * block : 8 * block + 8, 8 * entry : 8 * entry + 8] = bit
        assert_equal(found, seen.numpy())


@pytest.mark.parametrize("case", [*CASES, LONG], ids=str)
def test_the_sizes_of_a_plan_are_known_beforehand(case):
    g = case.fast_geometry()
    fake = cpu.fake_plan(g.positions, g.members, g.nearest)
    for real, expected in zip(g.plan.tensors, fake, strict=True):
        assert (real.shape, real.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MORE, ids=str)
def test_result_agrees(case, dtype):
    inputs, geometry = inputs_for(case, dtype), case.fast_geometry(torch.float64)
    if case is LONG:
        assert geometry.plan.tensors[2][..., 1].max() > 2 * CHUNK
    oracle = by_definition({name: x.double() for name, x in inputs.items()}, geometry)
    got, baseline = by_path(inputs, geometry), by_definition(inputs, geometry)
    assert_parity(got, oracle.numpy(), baseline, dtype, name="attention, cpu")


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("case", MORE, ids=str)
def test_gradients_agree(case, dtype):
    inputs, geometry = inputs_for(case, dtype), case.fast_geometry(torch.float64)
    grad_out = case.normal("grad_out", case.n, case.heads, case.dim // case.heads, dtype=dtype)
    got = with_gradients(by_path, inputs, geometry, grad_out)[1]
    wide = with_gradients(by_definition, {name: x.double() for name, x in inputs.items()}, geometry, grad_out)[1]
    baseline = with_gradients(by_definition, inputs, geometry, grad_out)[1]
    oracle = {name: x.numpy() for name, x in wide.items()}
    assert_layers(got, oracle, baseline, dtype, GRADIENT, name="attention gradient, cpu")


@pytest.mark.parametrize("case", MORE, ids=str)
def test_gradients_agree_in_float64(case):
    inputs, geometry = inputs_for(case, torch.float64), case.fast_geometry(torch.float64)
    grad_out = case.normal("grad_out", case.n, case.heads, case.dim // case.heads)
    got, expected = (with_gradients(f, inputs, geometry, grad_out)[1] for f in (by_path, by_definition))
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-12, atol=1e-12 * grad.abs().max().item())


@pytest.mark.parametrize("curve", ["scanline", "hilbert"])
@pytest.mark.parametrize("heads", [1, 5])
def test_the_same_bits_for_any_number_of_threads(curve, heads):
    """With several ranges of tiles in the backward pass, and with one, where a curve leads far and back again."""
    case = Case("threads", (56, 56), dim=8 * heads, heads=heads)
    geometry = stage_geometry(torch.from_numpy(case.positions()), 8, 48, case.grid_size, curve)
    inputs, grad_out = inputs_for(case, torch.float32), case.normal("grad_out", case.n, heads, 8, dtype=torch.float32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out, grads = with_gradients(by_path, inputs, geometry, grad_out)
        plan = cpu.make_plan(geometry.positions, geometry.members, geometry.nearest)
        results.append([out, *grads.values(), *plan[:3]])
    torch.set_num_threads(1)
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("case", ["last_cluster_of_one", "n_not_multiple_of_m", "odd_channels", "cluster_24"])
def test_empty_places_are_not_read_and_hold_zeros(case):
    """Also what is not a number stays there."""
    case = case_named(case)
    inputs, geometry = inputs_for(case, torch.float32), case.fast_geometry().renumbered()
    empty = geometry.members.flatten(1) < 0
    rows = [case.fast_geometry().to_clusters(inputs[name]) for name in ("query", "kv")]
    rest = [inputs[name] for name in ("blank", "weight", "bias")]
    plan, grad_out = cpu.Plan(*geometry.plan.tensors), torch.ones_like(rows[0])
    results = []
    for filling in (0.0, torch.nan):
        for x in (*rows, grad_out):
            x[empty] = filling
        out, lse = cpu.forward(*rows, *rest, plan, geometry.members)
        assert not out[empty].any() and not lse[empty].any()
        grads = cpu.backward(grad_out, out, lse, *rows, *rest, plan, geometry.members)
        assert not grads[0][empty].any() and not grads[1][empty].any()
        results.append([out, lse, *grads])
    assert empty.any() and all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_far_positions_lose_no_digits():
    case = case_named("n_not_multiple_of_m")
    inputs, geometry = inputs_for(case, torch.float32), case.fast_geometry()
    far = geometry.positions + torch.tensor([FAR, -FAR])
    rows = [geometry.to_clusters(inputs[name]) for name in ("query", "kv")]
    rest = [inputs[name] for name in ("blank", "weight", "bias")]
    results = [
        cpu.forward(*rows, *rest, cpu.make_plan(positions, geometry.members, geometry.nearest), geometry.members)[0]
        for positions in (geometry.positions, far)
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e5, 1e30], ids=str)
def test_all_weight_may_be_one_token_s(dtype, size):
    """Where logits lie so far apart, and are so large, that exponentials would overflow and vanish."""
    case = case_named("batch_of_3")
    inputs, geometry = inputs_for(case, dtype), case.fast_geometry(torch.float64)
    assert geometry.neighbors.shape[1] == case.n and geometry.valid.all()
    inputs["query"] = inputs["query"] * size
    images = torch.arange(3)[:, None, None]
    rows = torch.cat(
        [inputs["kv"][images, geometry.neighbors], inputs["blank"].expand(3, case.n, 1, -1, -1, -1)], dim=2
    )  # (B, n, M + 1, H, 2, d)
    logits = torch.einsum("bnhd,bnmhd->bnmh", inputs["query"], rows[..., 0, :]).double()
    first, second = logits.topk(2, dim=2).values.unbind(2)
    sure = first - second > 2e3 + 1e-3 * first.abs()  # all but a few
    chosen = logits.argmax(dim=2)[:, :, None, :, None].expand(-1, -1, -1, -1, rows.shape[-1])
    expected = rows[..., 1, :].gather(2, chosen).squeeze(2)
    assert sure.double().mean() > 0.9
    assert torch.equal(by_path(inputs, geometry)[sure], expected[sure])


def test_what_is_not_a_number_stays_visible():
    case = case_named("batch_of_3")
    inputs, geometry = inputs_for(case, torch.float32), case.fast_geometry()
    inputs["query"][1, 5, 0, 0] = torch.nan
    out = by_path(inputs, geometry)
    assert out[1, 5, 0].isnan().all() and out.isnan().sum() == out.shape[-1]
    inputs["query"][1, 5, 0, 0], inputs["kv"][2, 7, 1, 0, 0] = 0, torch.nan
    sees = (geometry.neighbors[2] == 7).any(dim=1)
    assert sees.any() and by_path(inputs, geometry)[2, sees, 1].isnan().all()
