"""The fused attention kernels against the reference: in Triton's interpreter on small cases, on a GPU on all."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import reference.attention
from parity_tests import plain
from parity_tests.cases import CASES, Case
from parity_tests.compare import GRADIENT, assert_layers, assert_parity
from parity_tests.gradients import flat

pytest.importorskip("triton")
from fast.ops import support
from fast.ops.attention import triton as attention
from fast.ops.attention import triton_plan as plan

GPU = torch.cuda.is_available()
WHERE = "cuda" if GPU else "cpu"
NAMES = ("query", "key_value", "blank", "weight", "bias")
SMALLEST = [
    Case("one_token", (8, 8), 1, heads=1, dim=4),
    Case("global", (5, 8), 36, neighborhood=48),
    Case("last_cluster_of_one", (4, 8), 25, neighborhood=16, batch=3, heads=1, dim=6),
    Case("odd_channels", (6, 6), 30, cluster_size=7, neighborhood=14, dim=15, heads=3),
    Case("clusters_of_one", (5, 6), 18, cluster_size=1, neighborhood=5, shuffled=True),
    Case("cluster_24", (9, 9), 60, cluster_size=24, neighborhood=48, heads=1, dim=20),
]
ON_GPU = [*CASES, Case("stage_1", (56, 56), neighborhood=48, batch=2, dim=64)]
MATRIX = [(case, torch.float32) for case in SMALLEST]
MATRIX += [(SMALLEST[2], torch.bfloat16), (SMALLEST[3], torch.float64)]
MATRIX += [
    pytest.param(case, dtype, marks=pytest.mark.skipif(not GPU, reason="no GPU"))
    for case in ON_GPU
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
]
TIES = SMALLEST[2]


def values(case, dtype):
    """Random inputs of ``forward`` but the plan, in the order of the tokens, and an grad_out gradient."""
    heads, d = case.heads, case.dim // case.heads
    shapes = {"query": (case.n, heads, d), "key_value": (case.n, heads, 2, d), "grad_out": (case.n, heads, d)}
    made = {name: case.normal(name, *shape, dtype=dtype) for name, shape in shapes.items()}
    for name, shape in {"blank": (heads, 2, d), "weight": (heads, 5), "bias": (heads,)}.items():
        made[name] = (case.normal(name, *shape)[0] * (0.1 if name == "weight" else 1)).to(dtype)
    return made, made.pop("grad_out")


def geometry_of(case):
    return case.fast_geometry(device=WHERE)


def to_places(x, geometry, empty=torch.nan):
    """Tokens to their places; what stands in empty ones must not matter."""
    there = (geometry.members.flatten(1) >= 0).view(len(geometry.members), -1, *[1] * (x.ndim - 2))
    return torch.where(there, geometry.to_clusters(x.to(WHERE)), empty)


def run(inputs, grad_out, geometry):
    """Out, log-sum-exp and gradients, all in the order of the tokens."""
    made = attention.make_plan(geometry.positions, geometry.members, geometry.nearest)
    rows = [to_places(inputs[name], geometry) for name in NAMES[:2]]
    small = [inputs["blank"].to(WHERE), *(inputs[name].to(WHERE, torch.float32) for name in NAMES[3:])]
    if grad_out.dtype == torch.float64:
        small = [inputs[name].to(WHERE) for name in NAMES[2:]]
    out, lse = attention.forward(*rows, *small, made)
    grads = attention.backward(to_places(grad_out, geometry), out, lse, *rows, *small, made)
    assert all(x.isfinite().all() for x in (out, lse, *grads))
    grads = {name: grad.to(grad_out.dtype) for name, grad in zip(NAMES, grads, strict=True)}
    for name in NAMES[:2]:
        grads[name] = geometry.from_clusters(grads[name])
    return geometry.from_clusters(out), geometry.from_clusters(lse), grads


def parts(inputs, g, i):
    """Arguments of ``local_attention`` for image ``i``, position term included."""
    key, value = inputs["key_value"][i].unbind(2)
    bias = plain.linear(torch.as_tensor(g.relative).to(key.dtype), inputs)
    made = {"query": inputs["query"][i], "key": key, "value": value, "bias": bias}
    return made | {"blank_key": inputs["blank"][:, 0], "blank_value": inputs["blank"][:, 1]}


def in_plain(inputs, case):
    return torch.stack(
        [
            plain.local_attention(neighbors=g.neighbors, valid=g.valid, **parts(inputs, g, i))
            for i, g in enumerate(case.reference_geometry())
        ]
    )


def position_term_together(grads, stack):
    """Weight and bias as one array: the bias's gradient may be nearly 0, where a baseline in bfloat16 tells nothing."""
    grads = dict(grads)
    return grads | {"weight, bias": stack([grads.pop("weight"), grads.pop("bias")])}


def in_reference(inputs, case):
    """Out and log-sum-exp in float64."""
    exact, out, lse = {name: x.double() for name, x in inputs.items()}, [], []
    for i, g in enumerate(case.reference_geometry()):
        made = {name: x.numpy() for name, x in parts(exact, g, i).items()}
        out.append(reference.attention.local_attention(neighbors=g.neighbors, valid=g.valid, **made))
        logits = np.einsum("nhd,nmhd->nmh", made["query"], made["key"][g.neighbors]) + made["bias"]
        blank = np.einsum("nhd,hd->nh", made["query"], made["blank_key"])
        lse.append(np.log(np.exp(blank) + (np.exp(logits) * g.valid[:, :, None]).sum(axis=1)))
    return np.stack(out), np.stack(lse)


@pytest.mark.parametrize(("case", "dtype"), MATRIX, ids=str)
def test_forward_and_backward_agree(case, dtype):
    """Oracle of the gradients: plain PyTorch's in float64, which test_attention ties to the reference."""
    inputs, grad_out = values(case, dtype)
    out, lse, grads = run(inputs, grad_out, geometry_of(case))
    oracle, level = in_reference(inputs, case)
    assert_parity(out, oracle, in_plain(inputs, case), dtype, name="fused attention")
    wide = torch.promote_types(dtype, torch.float32)
    assert_parity(lse, level, level, wide, name="fused attention: lse")
    references = [flat(inputs, lambda x: in_plain(x, case), grad_out, d) for d in (torch.float64, dtype)]
    references = [position_term_together(x, np.column_stack) for x in references]
    grads = position_term_together(grads, torch.column_stack)
    assert_layers(grads, *references, dtype, GRADIENT, name="fused attention gradient")


def test_tiles_do_not_matter_and_two_runs_are_equal(monkeypatch):
    inputs, grad_out = values(TIES, torch.float32)
    results = []
    for columns in (16, 16, 64):
        monkeypatch.setattr(attention, "COLUMNS", columns)
        results.append(run(inputs, grad_out, geometry_of(TIES)))
    flattened = [[out, lse, *(grads[name] for name in NAMES)] for out, lse, grads in results]
    assert all(torch.equal(*pair) for pair in zip(*flattened[:2], strict=True))
    for pair in zip(*flattened[1:], strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)


def test_geometry_of_one_serves_a_batch():
    one = Case("one", (4, 8), 25, neighborhood=16, heads=1, dim=6)
    many = Case("many", (4, 8), 25, neighborhood=16, heads=1, dim=6, batch=3)
    inputs, grad_out = values(many, torch.float32)
    together = run(inputs, grad_out, geometry_of(one))
    alone = []
    for i in range(3):
        image = inputs | {name: inputs[name][i : i + 1] for name in NAMES[:2]}
        alone.append(run(image, grad_out[i : i + 1], geometry_of(one)))
    assert torch.equal(together[0], torch.cat([out for out, _, _ in alone]))
    assert torch.equal(together[2]["query"], torch.cat([grads["query"] for _, _, grads in alone]))
    assert torch.equal(together[2]["key_value"], torch.cat([grads["key_value"] for _, _, grads in alone]))
    torch.testing.assert_close(together[2]["weight"], sum(grads["weight"] for _, _, grads in alone))


def test_strides_do_not_matter():
    inputs, grad_out = values(TIES, torch.float32)
    geometry = geometry_of(TIES)
    made = attention.make_plan(geometry.positions, geometry.members, geometry.nearest)
    rows = [to_places(x, geometry, 0) for x in (inputs["query"], inputs["key_value"], grad_out)]
    small = [inputs[name].to(WHERE) for name in NAMES[2:]]
    heads_first = rows[0].transpose(1, 2).contiguous().transpose(1, 2)
    odd = [heads_first.repeat_interleave(2, dim=0)[::2], rows[1].transpose(-1, -2).contiguous().transpose(-1, -2)]
    grad_out = torch.nn.functional.pad(rows[2], (3, 0))[..., 3:]
    results = []
    for given, up in ((rows[:2], rows[2]), (odd, grad_out)):
        out, lse = attention.forward(*given, *small, made)
        results.append([out, lse, *attention.backward(up, out, lse, *given, *small, made)])
        assert all(x.is_contiguous() for x in results[-1])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("images", [0, 1])
def test_a_batch_of_none(images):
    geometry = geometry_of(Case("one", (4, 8), 25, neighborhood=16))
    places = [x[:images] for x in (geometry.positions, geometry.members, geometry.nearest)]
    made = attention.make_plan(*places)
    inputs = [torch.ones(*shape, device=WHERE) for shape in ((0, 32, 2, 6), (0, 32, 2, 2, 6), (2, 2, 6), (2, 5), (2,))]
    out, lse = attention.forward(*inputs, made)
    assert out.shape == (0, 32, 2, 6) and lse.shape == (0, 32, 2)
    grads = attention.backward(out, out, lse, *inputs, made)
    assert all(grad.shape == x.shape and not grad.any() for grad, x in zip(grads, inputs, strict=True))


@pytest.mark.parametrize("case", [*SMALLEST[2:], CASES[14], CASES[16]], ids=str)
def test_lists_of_the_plan(case):
    """Who sees whom, from the definition."""
    geometry = case.fast_geometry()
    made = attention.make_plan(geometry.positions, geometry.members, geometry.nearest)
    k, m = geometry.members.shape[1:]
    size = plan.group_size(m)
    groups = -(-k // size)
    for i, (members, nearest) in enumerate(zip(geometry.members, geometry.nearest, strict=True)):
        pairs = {(q // m, c) for q, t in enumerate(members.flatten().tolist()) if t >= 0 for c in nearest[t].tolist()}
        for g in range(groups):
            seen, seers = (
                lists[starts[i * groups + g] : starts[i * groups + g + 1]].tolist()
                for starts, lists in ((made.visible_start, made.visible), (made.seers_start, made.seers))
            )
            assert seen == sorted({c for q, c in pairs if q // size == g})
            assert seers == sorted({q for q, c in pairs if c // size == g})
    again = attention.plan_of(made[:-1], geometry.members)
    assert again.cluster_size == made.cluster_size == m and again.visible is made.visible


def test_what_is_refused():
    geometry = geometry_of(TIES)
    made = attention.make_plan(geometry.positions, geometry.members, geometry.nearest)
    inputs = [torch.ones(*shape, device=WHERE) for shape in ((3, 32, 1, 6), (3, 32, 1, 2, 6), (1, 2, 6), (1, 5), (1,))]
    with pytest.raises(TypeError, match="query and key_value must both be"):
        attention.forward(inputs[0], inputs[1].half(), *inputs[2:], made)
    with pytest.raises(TypeError, match="int64"):
        attention.forward(*(x.long() for x in inputs), made)
    with pytest.raises(ValueError, match=r"weight must have shape \(1, 5\), not \(5, 1\)"):
        attention.forward(*inputs[:3], inputs[3].T, inputs[4], made)
    with pytest.raises(ValueError, match="3 images of 32 places, the query of 2 of 32"):
        attention.forward(*(x[:2] for x in inputs[:2]), *inputs[2:], made)
    with pytest.raises(ValueError, match="clusters of at most 128 tokens, not 129"):
        attention.make_plan(geometry.positions, torch.zeros(3, 2, 129, dtype=torch.int64), geometry.nearest)


def test_more_than_indices_hold_is_refused():
    """On tensors without memory."""
    k = 1 << 22
    shapes = [(1, 8 * k, 4, 8), (1, 8 * k, 4, 2, 8), (4, 2, 8), (4, 5), (4,)]
    inputs = [torch.empty(*shape, device="meta") for shape in shapes]
    cells = torch.empty(1, 3, 8 * k, dtype=torch.int32, device="meta")
    near, lists = cells[:, :1], [cells[0, 0]] * 4
    with pytest.raises(ValueError, match="1 x 33554432 tokens of 32 channels do not fit 32-bit indices"):
        attention.forward(*inputs, plan.Plan(cells, near, *lists, 8))
    members = torch.empty(1, 1 << 27, 8, dtype=torch.int64, device="meta")
    nearest = torch.empty(1, 8 << 27, 6, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="1 x 1073741824 places of 6 clusters do not fit"):
        attention.make_plan(nearest[..., :2], members, nearest)


def test_why_the_kernels_cannot_run(monkeypatch):
    assert support.triton_unavailable(WHERE) is None
    assert "meta" in support.triton_unavailable("meta")
    monkeypatch.setattr(support, "interpreted", lambda: False)
    assert support.triton_unavailable("cpu").startswith("needs a CUDA device, not cpu")
    if not GPU:
        assert "CUDA" in support.triton_unavailable("cuda")
    monkeypatch.setattr(support, "_no_triton", lambda: "Triton is not installed (pip install triton)")
    assert "pip install triton" in support.triton_unavailable("cuda")


COMPILE = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from fast.ops.attention import triton_kernels as attention_kernels
for kernel, seen in (("forward_kernel", 0), ("query_kernel", 6), ("key_kernel", 6)):
    kernel = getattr(attention_kernels, kernel)
    sizes = dict(M=8, R=seen, ROWS=16, HEIGHT=16, WIDTH=32, D=20, CHANNELS=32, WIDE=tl.float32)
    types = dict.fromkeys(("weight", "bias", "lse", "delta", "partial"), "*fp32")
    types |= dict.fromkeys(("cells", "near", "start", "lists"), "*i32")
    types |= dict.fromkeys(("query", "pair", "blank", "grad_out", "out", "grad_query", "grad_pair"), "*bf16")
    signature = {name: "constexpr" if name in sizes else types.get(name, "i32") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in sizes.items()})
    options = {"num_warps": 1, "num_stages": 2, "enable_fp_fusion": True}
    made = triton.compile(source, GPUTarget("cuda", 80, 32), options).asm
    print("mma.sync" in made["ptx"], "atom" in made["ptx"], len(made["cubin"]) > 0)
"""


def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path):
    """To machine code, with tensor cores and without atomics: the interpreter takes more Python than the compiler."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "error", "-c", COMPILE]
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["True", "False", "True"] * 3
