"""The merging operator and its kernels: numbers and every gradient on each path, odd shapes, the same bits again."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import reference.merging
import reference.position
from fast import merging, ops
from fast.ops import dispatch
from parity_tests import plain
from parity_tests.cases import DTYPES
from parity_tests.compare import GRADIENT, assert_layers, assert_parity
from parity_tests.gradients import flat
from parity_tests.ops.triton_kernels import DEVICE, cuda, run_without_interpreter

PATHS = dispatch.PATHS["merging"]
KERNELS = PATHS[:-1]
LETTERS = ("0.weight", "0.bias", "1.weight", "1.bias")


@dataclass(frozen=True)
class Sizes:
    """Of a merge."""

    name: str
    n: int
    centres: int
    slots: int
    channels: int
    batch: int = 1
    scored: bool = True
    sign: int = 1
    shared: bool = False  # one set of positions for all images

    def __str__(self):
        return self.name


SMALL = [
    Sizes("odd_channels", 7, 3, 5, 15, batch=2),
    Sizes("shared_positions", 6, 2, 4, 4, batch=3, shared=True),
    Sizes("more_slots_than_a_tile", 9, 1, 70, 3),
    Sizes("more_channels_than_a_tile", 4, 2, 3, 130),
    Sizes("more_readers_than_a_tile", 2, 6, 6, 4),
    Sizes("pointconv", 9, 9, 9, 6, scored=False, sign=-1),
    Sizes("one_token", 1, 1, 1, 2, scored=False),
]
LARGE = [
    Sizes("stage_1", 3136, 784, 48, 64, batch=4, shared=True),
    Sizes("stage_3", 196, 49, 48, 256, batch=8),
    Sizes("wide_neighbourhoods", 576, 144, 144, 192, batch=2),
    Sizes("pointconv_256", 4096, 4096, 9, 256, scored=False, sign=-1),
]


def tensors_for(sizes, dtype, device=DEVICE):
    """Floating inputs by name, and positions, kept, neighbours with some empty slots."""
    rng = np.random.default_rng(sizes.n + sizes.channels)
    side = int(np.ceil(sizes.n**0.5)) + 1
    b, n, k, m = sizes.batch, sizes.n, sizes.centres, sizes.slots
    cells = np.stack([rng.permutation(side * side)[:n] for _ in range(1 if sizes.shared else b)])
    neighbors = rng.integers(0, n, (b, k, m))
    neighbors[rng.random((b, k, m)) < 0.2] = -1
    kept = np.stack([np.sort(rng.permutation(max(n, k))[:k] % n) for _ in range(b)])
    neighbors[..., 0] = kept  # distance 0
    shapes = {"features": (b, n, sizes.channels)} | ({"scores": (b, n)} if sizes.scored else {})
    shapes |= dict(zip(LETTERS, [(4, 5), (4,), (4,), (4,)], strict=True))
    floating = {name: torch.from_numpy(rng.standard_normal(shape)).to(device, dtype) for name, shape in shapes.items()}
    indices = (np.stack([cells % side, cells // side], axis=-1), kept, neighbors)
    return floating, [torch.from_numpy(x).to(device) for x in indices]


def run(inputs, indices, sign):
    """The operator, from separate parameters."""
    columns = [inputs[LETTERS[0]].T, *(inputs[name][None] for name in LETTERS[1:])]
    return ops.merge(inputs["features"], inputs.get("scores"), *indices, torch.cat(columns), sign)


def gradients(inputs, indices, sign, grad_out):
    """The operator's result and gradients by name."""
    inputs = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    out = run(inputs, indices, sign)
    out.backward(grad_out)
    return out.detach(), {name: x.grad for name, x in inputs.items()}


def oracle_of(inputs, indices, sign):
    """The reference's sum, an image at a time, float64."""
    exact = {name: x.double().cpu().numpy() for name, x in inputs.items()}
    positions, kept, neighbors = (x.cpu().numpy() for x in indices)
    weights, out = {name: exact[name] for name in LETTERS}, []
    for i, (centres, near) in enumerate(zip(kept, neighbors, strict=True)):
        p = positions[i % len(positions)]
        relative = reference.position.relative_position(sign * (p[near] - p[centres][:, None]))
        slots = reference.merging.slot_weights(relative, near >= 0, weights)
        scores = exact["scores"][i] if "scores" in exact else np.ones(len(p))
        out.append(reference.merging.merge_neighborhoods(exact["features"][i], scores, near, slots))
    return np.stack(out)


def plain_of(inputs, indices, sign):
    """The same formula, plain, in the dtype of the inputs, on the CPU."""
    positions, kept, neighbors = (x.cpu() for x in indices)
    weights, out = {name: inputs[name] for name in LETTERS}, []
    for i, (centres, near) in enumerate(zip(kept, neighbors, strict=True)):
        p, features = positions[i % len(positions)], inputs["features"][i]
        relative = plain.relative_position(sign * (p[near] - p[centres][:, None]), features.dtype)
        slots = plain.slot_weights(relative, near >= 0, weights)
        scores = inputs["scores"][i] if "scores" in inputs else torch.ones_like(features[:, 0])
        out.append(plain.merge_neighborhoods(features, scores, near, slots))
    return torch.stack(out)


def check(sizes, dtype, path):
    """Compare result and gradients of one path."""
    inputs, indices = tensors_for(sizes, dtype)
    grad_out = torch.randn(sizes.batch, sizes.centres, 4 * sizes.channels).to(dtype)
    with dispatch.force(merging=path):
        out, got = gradients(inputs, indices, sizes.sign, grad_out.to(DEVICE))
    inputs = {name: x.cpu() for name, x in inputs.items()}
    name = f"merge operator, {path}"
    baseline = plain_of(inputs, indices, sizes.sign)
    assert_parity(out, oracle_of(inputs, indices, sizes.sign), baseline, dtype, name=name)
    references = [flat(inputs, lambda i: plain_of(i, indices, sizes.sign), grad_out, d) for d in (torch.float64, dtype)]
    assert_layers(got, *references, dtype, GRADIENT, name=f"{name} gradient")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SMALL, ids=str)
def test_result_and_every_gradient_agree(sizes, dtype, path):
    torch.manual_seed(0)
    check(sizes, dtype, path)


@cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", LARGE, ids=str)
def test_result_and_every_gradient_agree_at_full_size(sizes, dtype):
    torch.manual_seed(0)
    check(sizes, dtype, "triton")


@pytest.mark.parametrize("path", PATHS)
def test_low_precision_features_with_float32_scores_give_float32(path):
    inputs, indices = tensors_for(SMALL[0], torch.float32)
    low = inputs | {"features": inputs["features"].half()}
    with dispatch.force(merging=path):
        out, got = gradients(low, indices, 1, torch.ones(2, 3, 60, device=DEVICE))
        exact = run(low | {"features": low["features"].float()}, indices, 1)
    assert out.dtype == torch.float32 and torch.equal(out, exact)
    assert got["features"].dtype == torch.float16 and got["scores"].dtype == torch.float32


@pytest.mark.parametrize("path", PATHS)
def test_the_same_bits_again_whatever_the_strides(path):
    inputs, indices = tensors_for(SMALL[0], torch.float32)
    grad_out = torch.randn(2, 3, 60, device=DEVICE)
    turned = {n: x.mT.contiguous().mT if x.ndim > 1 else torch.stack([x, x], dim=1)[:, 0] for n, x in inputs.items()}
    assert not any(x.is_contiguous() for x in turned.values())
    with dispatch.force(merging=path):
        first = gradients(inputs, indices, 1, grad_out)
        others = [x.mT.contiguous().mT for x in indices]
        second = gradients(turned, others, 1, grad_out.mT.contiguous().mT)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in inputs)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("empty", ["batch", "centres", "slots"])
def test_of_nothing_comes_nothing(empty, path):
    count = {"batch": 2, "centres": 3, "slots": 5, empty: 0}
    inputs, indices = tensors_for(SMALL[0], torch.float32)
    inputs = {n: x[: count["batch"]] if n in ("features", "scores") else x for n, x in inputs.items()}
    positions, kept, neighbors = (x[: count["batch"]] for x in indices)
    indices = positions, kept[:, : count["centres"]], neighbors[:, : count["centres"], : count["slots"]]
    grad_out = torch.randn(count["batch"], count["centres"], 60, device=DEVICE)
    with dispatch.force(merging=path):
        out, got = gradients(inputs, indices, 1, grad_out)
    assert out.shape == grad_out.shape and not out.any() and not any(g.any() for g in got.values())


def test_more_centres_or_slots_than_a_kernel_numbers_are_refused():
    from fast.ops.merging import triton as kernels

    inputs, (positions, _, _) = tensors_for(SMALL[0], torch.float32)
    few, matrix = (inputs["features"], inputs["scores"], positions), torch.zeros(8, 4)
    kept = torch.zeros(1, 1, dtype=torch.int64).expand(2, 2**30)
    with pytest.raises(ValueError, match="2147483648 centres .*smaller batch"):
        kernels.forward(*few, kept, kept[..., None], matrix, 1)
    kept, neighbors = kept[:, : 2**20], kept[:, : 2**20, None].expand(-1, -1, 2**11)
    with pytest.raises(ValueError, match="2147483648 slots .*smaller batch or image"):
        kernels.backward(torch.zeros(1), *few, kept, neighbors, matrix, 1)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("path", KERNELS)
@pytest.mark.parametrize("sizes", [SMALL[0], SMALL[6]], ids=str)
def test_opcheck(sizes, path):
    inputs, indices = tensors_for(sizes, torch.float32)
    features, scores = inputs["features"].requires_grad_(), inputs.get("scores")
    matrix = torch.randn(8, 4, device=DEVICE, requires_grad=True)
    with dispatch.force(merging=path):
        torch.library.opcheck(torch.ops.aff.merge.default, (features, scores, *indices, matrix, sizes.sign, path))
        grad = run(inputs, indices, sizes.sign).detach()
        whole = (grad, features.detach(), scores, *indices, matrix.detach(), sizes.sign, path)
        torch.library.opcheck(torch.ops.aff.merge_backward.default, whole)


def test_parameter_matrix_holds_the_whole_network():
    net = merging.weight_network().double()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_()
    matrix, e = ops.parameter_matrix(net), torch.randn(6, 5, dtype=torch.float64)
    normal = torch.nn.functional.layer_norm(e @ matrix[:5] + matrix[5], (4,))
    torch.testing.assert_close(torch.nn.functional.gelu(normal * matrix[6] + matrix[7]), net(e))


def test_kernels_compile_for_a_gpu():
    """The interpreter takes what the compiler refuses: compile for an H100."""
    code = """
import triton.language as tl
from fast.ops.merging import triton as m
from parity_tests.ops.triton_kernels import compile_kernel
tensors = dict.fromkeys(("positions", "kept", "neighbors", "offsets", "entries"), "*i64")
tensors |= dict.fromkeys(("scores", "parameters", "out", "grad", "partial", "grad_scores"), "*fp32")
tensors |= dict.fromkeys(("features", "grad_features"), "*bf16")
for kernel in (m._merge, m._parameter_gradients, m._token_gradients):
    block = "BLOCK_E" if kernel is m._token_gradients else "BLOCK_M"
    constants = {"SIGN": 1, "WIDE": tl.float32, block: 16, "BLOCK_C": 64}
    print(len(compile_kernel(kernel, tensors, constants, 90).asm["cubin"]) > 0)
"""
    assert run_without_interpreter(code) == "True\n" * 3
