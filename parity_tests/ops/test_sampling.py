"""Sampling at locations between tokens: numbers and every gradient on each path, odd shapes, the same bits again."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import reference.interpolation
from fast import deformable, interpolation, ops
from fast.ops import dispatch
from parity_tests.compare import GRADIENT, assert_parity
from parity_tests.ops.triton_kernels import DEVICE, cuda, run_without_interpreter

PATHS = dispatch.PATHS["sampling"]
KERNELS = PATHS[:-1]
POWERS = 5  # grad_outs that the power's gradient is compared on, and one more


@dataclass(frozen=True)
class Sizes:
    """Of a read."""

    name: str
    queries: int
    heads: int
    points: int
    n: int
    channels: int
    k: int = 4
    batch: int = 1
    attention: bool = True
    integer: bool = False  # locations on cells
    shared: bool = False  # one set of positions for all images
    missing: bool = False  # some slots name no token

    def __str__(self):
        return self.name


SMALL = [
    Sizes("deformable", 5, 2, 4, 12, 8, batch=2),
    Sizes("three_levels", 3, 2, 12, 9, 4, missing=True),
    Sizes("odd_points_and_channels", 4, 3, 3, 7, 15, batch=3, shared=True),
    Sizes("fewer_tokens_than_four", 3, 2, 2, 3, 4, k=3),
    Sizes("shepard", 9, 1, 1, 11, 70, attention=False),
    Sizes("shepard_at_cells", 20, 1, 1, 6, 5, batch=2, attention=False, integer=True),
    Sizes("more_readers_than_a_tile", 7, 1, 4, 2, 3, k=2),
]
LARGE = [
    Sizes("levels_at_512", 2688, 8, 12, 2688, 32, batch=2),
    Sizes("shepard_at_512", 16384, 1, 1, 2048, 256, attention=False, integer=True),
]


def tensors_for(sizes, dtype, low=None, device=DEVICE):
    """Floating inputs by name (values in ``low``, if given), locations if they are integers, positions and nearest."""
    rng = np.random.default_rng(sizes.n + sizes.channels)
    b, q, h, p, n = sizes.batch, sizes.queries, sizes.heads, sizes.points, sizes.n
    side = int(np.ceil((3 * n) ** 0.5))
    cells = np.stack([rng.permutation(side * side)[:n] for _ in range(1 if sizes.shared else b)])
    positions = np.stack([cells % side, cells // side], axis=-1)
    locations = rng.uniform(-3, side + 3, (b, q, h, p, 2))
    nearest = rng.integers(0, n, (b, q, h, p, sizes.k)) if n > 99 else rng.random((b, q, h, p, n)).argsort(axis=-1)
    nearest = nearest[..., : sizes.k]
    if sizes.missing:
        nearest[rng.random(nearest.shape) < 0.3] = -1
        nearest[..., 0] = 2
    locations[:, ::3, 0, 0] = positions[0, nearest[0, 0, 0, 0, 0]]  # on a token, where its images share positions
    floating = {
        "locations": locations,
        "attention": rng.standard_normal((b, q, h, p)),
        "values": rng.standard_normal((b, n, h, sizes.channels)),
        "half_power": np.array([2.7]),
    }
    floating = {name: torch.from_numpy(x).to(device, dtype) for name, x in floating.items()}
    floating["values"] = floating["values"].to(low or dtype)
    indices = {"positions": torch.from_numpy(positions).to(device), "nearest": torch.from_numpy(nearest).to(device)}
    if sizes.integer:
        indices["locations"] = floating.pop("locations").round().long()
    if not sizes.attention:
        floating.pop("attention")
    return floating, indices


def run(inputs, indices):
    x = inputs | indices
    order = (x["locations"], x.get("attention"), x["positions"], x["values"], x["nearest"], x["half_power"])
    return ops.sample(*order)


def plain(inputs, indices):
    """The formula of ``plain_heads``, with heads, attention and missing slots, in the dtype of the power."""
    x, wide = inputs | indices, inputs["half_power"].dtype
    near, missing = x["nearest"].clamp(min=0), x["nearest"] < 0
    image, head = torch.arange(len(near))[:, None, None, None, None], torch.arange(near.shape[2])[:, None, None]
    positions = x["positions"].expand(len(near), -1, -1)[image, near]
    squared = ((positions - x["locations"][..., None, :].to(wide)) ** 2).sum(dim=-1)
    u = (1 / (squared ** x["half_power"] + interpolation.FLOOR)).masked_fill(missing, 0)
    w = u / u.sum(dim=-1, keepdim=True)
    if "attention" in x:
        w = w * x["attention"][..., None]
    return torch.einsum("bqhpk,bqhpkd->bqhd", w, x["values"].to(wide)[image, near, head]).to(x["values"].dtype)


def gradients(function, inputs, indices, grad_out):
    """A function's result and gradients by name, in one dict; of the power, one for each of several grad_outs.

    The power's gradient is one number, whose error in low precision is now and then nearly 0 by chance: no baseline.
    """
    inputs = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    out = function(inputs, indices)
    grad_outs = [grad_out, *(grad_out.roll(i, dims=1) * (-1) ** i for i in range(1, POWERS)), grad_out.flip(-1)]
    powers = [torch.autograd.grad(out, inputs["half_power"], u.to(out.dtype), retain_graph=True)[0] for u in grad_outs]
    out.backward(grad_out.to(out.dtype))
    return {"out": out.detach()} | {name: x.grad for name, x in inputs.items()} | {"half_power": torch.cat(powers)}


def check(sizes, dtype, path, low=None):
    """Compare result and gradients of one path; values and result in ``low``, if given."""
    inputs, indices = tensors_for(sizes, dtype, low)
    grad_out = torch.randn(sizes.batch, sizes.queries, sizes.heads, sizes.channels).to(low or dtype)
    with dispatch.force(sampling=path):
        got = gradients(run, inputs, indices, grad_out.to(DEVICE))
    inputs, indices = ({name: x.cpu() for name, x in y.items()} for y in (inputs, indices))
    wide = {name: x.double() for name, x in inputs.items()}
    baseline = gradients(plain, inputs, indices, grad_out)
    exact = gradients(plain, wide, indices, grad_out)
    for name, oracle in exact.items():
        if dtype == torch.float64:  # its own rounding counts: no oracle
            torch.testing.assert_close(got[name].cpu(), oracle, rtol=0, atol=1e-11 * oracle.abs().max().item())
        else:
            row = f"sample operator, {path}{'' if name == 'out' else ' gradient'}: {name}"
            factor = 2 if name == "out" else GRADIENT
            assert_parity(got[name], oracle, baseline[name], got[name].dtype, factor, name=row)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", SMALL, ids=str)
def test_result_and_every_gradient_agree(sizes, dtype, path):
    torch.manual_seed(0)
    check(sizes, dtype, path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [SMALL[0], SMALL[5]], ids=str)
def test_values_of_low_precision_are_read_at_float32_locations(sizes, low, path):
    torch.manual_seed(0)
    check(sizes, torch.float32, path, low)


@cuda
@pytest.mark.parametrize("low", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", LARGE, ids=str)
def test_result_and_every_gradient_agree_at_full_size(sizes, low):
    torch.manual_seed(0)
    check(sizes, torch.float32, "triton", low)


@pytest.mark.parametrize("path", PATHS)
def test_agrees_with_the_reference(path):
    inputs, indices = tensors_for(SMALL[4], torch.float64)
    with dispatch.force(sampling=path):
        got = run(inputs, indices)[0, :, 0].cpu()
    columns = inputs["locations"][0, :, 0, 0], indices["positions"][0], inputs["values"][0, :, 0]
    columns = (x.cpu().numpy() for x in (*columns, indices["nearest"][0, :, 0, 0]))
    oracle = reference.interpolation.shepard(*columns, inputs["half_power"].item())
    np.testing.assert_allclose(got.numpy(), oracle, rtol=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("half_power", [0.3, 3.0])
def test_on_a_token_the_gradients_are_finite(half_power, path):
    """Where the place is a token, its value is read and no gradient moves the place, however small the power."""
    inputs, indices = tensors_for(SMALL[0], torch.float32)
    tokens = indices["nearest"][..., 0].flatten(1)
    image = torch.arange(2, device=DEVICE)[:, None]
    inputs["locations"] = indices["positions"][image, tokens].view(inputs["locations"].shape).float()
    inputs["half_power"] = torch.tensor([half_power], device=DEVICE)
    with dispatch.force(sampling=path):
        got = gradients(run, inputs, indices, torch.ones(2, 5, 2, 8, device=DEVICE))
    assert all(g.isfinite().all() for g in got.values())
    assert got["locations"].abs().max() < 1e-6
    head = torch.arange(2, device=DEVICE)[:, None]
    own = inputs["values"][image[..., None, None], indices["nearest"][..., 0], head]
    torch.testing.assert_close(got["out"], (inputs["attention"][..., None] * own).sum(dim=3), rtol=1e-5, atol=1e-5)


def test_a_power_that_float32_cannot_hold_still_picks_the_nearest():
    """(1000^2)^8 overflows; the nearest of the four tokens is read all the same, with finite gradients."""
    inputs, indices = tensors_for(SMALL[0], torch.float32)
    inputs |= {"half_power": torch.tensor([8.0], device=DEVICE), "locations": inputs["locations"] + 1000}
    grad_out = torch.randn(2, 5, 2, 8, device=DEVICE)
    with dispatch.force(sampling="triton"):
        got = gradients(run, inputs, indices, grad_out)
    double = {name: x.double().cpu() for name, x in inputs.items()}
    exact = gradients(plain, double, {name: x.cpu() for name, x in indices.items()}, grad_out.cpu())
    for name in ("out", "attention", "values"):
        torch.testing.assert_close(got[name].cpu().double(), exact[name], rtol=1e-3, atol=1e-3)
    assert all(g.isfinite().all() for g in got.values())


@pytest.mark.parametrize("path", PATHS)
def test_the_same_bits_again_whatever_the_strides_and_index_type(path):
    inputs, indices = tensors_for(SMALL[0], torch.float32)
    grad_out = torch.randn(2, 5, 2, 8, device=DEVICE)
    turned = {name: x.mT.contiguous().mT for name, x in inputs.items() if x.ndim > 1}
    turned_indices = {name: x.mT.contiguous().mT for name, x in indices.items()}
    assert not any(x.is_contiguous() for x in (*turned.values(), *turned_indices.values()))
    turned_indices["nearest"] = turned_indices["nearest"].int()
    with dispatch.force(sampling=path):
        first = gradients(run, inputs, indices, grad_out)
        second = gradients(run, inputs | turned, turned_indices, grad_out.mT.contiguous().mT)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("batch, queries", [(0, 5), (2, 0)], ids=["no_image", "no_query"])
def test_of_nothing_comes_nothing(batch, queries, path):
    inputs, indices = tensors_for(SMALL[0], torch.float32)
    cut = {name: x if name == "half_power" else x[:batch] for name, x in inputs.items()}
    cut |= {name: cut[name][:, :queries] for name in ("locations", "attention")}
    indices = {"positions": indices["positions"][:batch], "nearest": indices["nearest"][:batch, :queries]}
    with dispatch.force(sampling=path):
        got = gradients(run, cut, indices, torch.ones(batch, queries, 2, 8, device=DEVICE))
    assert got["out"].shape == (batch, queries, 2, 8)
    assert all(not g.any() for g in got.values())


def test_more_rows_than_a_kernel_numbers_are_refused():
    from fast.ops.sampling import triton as kernels

    inputs, indices = tensors_for(SMALL[0], torch.float32)
    nearest = torch.zeros(1, 1, 1, 1, 1, dtype=torch.int64).expand(2, 2**29, 2, 4, 4)
    rest = inputs["locations"], None, indices["positions"], inputs["values"], nearest, inputs["half_power"]
    with pytest.raises(ValueError, match="2147483648 queries times heads .*smaller batch or image"):
        kernels.forward(*rest)
    rest = *rest[:4], nearest[:, : 2**26], rest[5]
    with pytest.raises(ValueError, match="2147483648 slots of an image"):
        kernels.backward(torch.zeros(1), *rest)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("path", KERNELS)
@pytest.mark.parametrize("sizes", [SMALL[3], SMALL[5]], ids=str)
def test_opcheck(sizes, path):
    inputs, indices = tensors_for(sizes, torch.float32)
    with dispatch.force(sampling=path):
        grad = run(inputs, indices)
        x = {name: v.requires_grad_() for name, v in inputs.items()} | indices
        order = [x.get(name) for name in ("locations", "attention", "positions", "values", "nearest", "half_power")]
        torch.library.opcheck(torch.ops.aff.sample.default, [*order, path])
        order = [v if v is None else v.detach() for v in (grad, *order)]
        torch.library.opcheck(torch.ops.aff.sample_backward.default, [*order, path])


@pytest.mark.parametrize("lookup", deformable.LOOKUPS)
def test_deformable_attention_is_the_same_on_both_paths(lookup):
    """Of a deepest level with three tokens, fewer than a place is read from."""
    torch.manual_seed(1)
    module = deformable.DeformableAttention(8, 2, 3, 2, lookup).double().to(DEVICE)
    for p in module.parameters():
        torch.nn.init.normal_(p)
    module.shepard_power.data.fill_(2.5)
    cells, sizes = torch.stack([torch.randperm(12) for _ in range(2)])[..., None].to(DEVICE), [3, 4, 5]
    positions = torch.cat([cells % 3, cells // 3], dim=-1)
    query, source = torch.randn(2, 2, 12, 8, dtype=torch.float64, device=DEVICE).requires_grad_()
    tables = deformable.lookup_tables(positions.split(sizes, dim=1), (4, 3))
    results = []
    for path in PATHS:
        with dispatch.force(sampling=path):
            out = module(query, positions, source, sizes, (4, 3), tables)
        results.append((out, *torch.autograd.grad(out.sin().sum(), (query, source, *module.parameters()))))
    for found in results[:-1]:
        for fused, gathered in zip(found, results[-1], strict=True):
            torch.testing.assert_close(fused, gathered, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("half_power", [3.0, torch.tensor([1.5])], ids=["fixed", "learnt"])
def test_shepard_is_the_same_on_both_paths(half_power):
    inputs, indices = tensors_for(SMALL[5], torch.float32)
    columns = (
        indices["locations"][:, :, 0, 0],
        indices["positions"],
        inputs["values"][:, :, 0],
        indices["nearest"][:, :, 0, 0],
    )
    half_power = half_power.to(DEVICE) if torch.is_tensor(half_power) else half_power
    results = []
    for path in PATHS:
        with dispatch.force(sampling=path):
            results.append(interpolation.shepard(*columns, half_power))
    for found in results[:-1]:
        torch.testing.assert_close(found, results[-1], rtol=1e-5, atol=1e-5)


def test_floor_of_the_kernels_is_that_of_the_definition():
    from fast.ops.sampling import triton as kernels

    assert kernels.FLOOR.value == interpolation.FLOOR == reference.interpolation.FLOOR


def test_kernels_compile_for_a_gpu():
    """The interpreter takes what the compiler refuses: compile for an H100."""
    code = """
import triton.language as tl
from fast.ops.sampling import triton as g
from parity_tests.ops.triton_kernels import compile_kernel
tensors = dict.fromkeys(("positions", "offsets", "entries"), "*i64") | {"nearest": "*i32"}
tensors |= dict.fromkeys(("sampling_locations", "attention", "half_power", "weights", "partial"), "*fp32")
tensors |= dict.fromkeys(("values", "out", "grad", "grad_values"), "*bf16")
tensors |= dict.fromkeys(("grad_locations", "grad_attention"), "*fp32")
tile = {"BLOCK_R": 4, "BLOCK_P": 4, "BLOCK_K": 4, "BLOCK_D": 32}
for kernel in (g._read, g._place_gradients, g._value_gradients):
    sizes = {"BLOCK_E": 16, "BLOCK_D": 32} if kernel is g._value_gradients else tile
    print(len(compile_kernel(kernel, tensors, {"WIDE": tl.float32, **sizes}, 90).asm["cubin"]) > 0)
"""
    assert run_without_interpreter(code) == "True\n" * 3
