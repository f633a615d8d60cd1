"""Neighbourhood attention on every path: result and gradients against the plain form, on every case, in every dtype.

``test_attention`` ties the plain form to the reference; Triton's kernels have more cases in ``test_attention_triton``.
"""

import pytest
import torch

from fast.ops import dispatch, neighborhood_attention
from fast.ops.attention.plain import local_attention
from parity_tests.cases import CASES, DTYPES, LOW, SMALL
from parity_tests.compare import GRADIENT, assert_layers, assert_parity

NAMES = ("query", "kv", "blank", "weight", "bias")
PATHS = [path for path in dispatch.PATHS["attention"] if path != "triton"]


def inputs_for(case, dtype):
    """Query (B, n, H, d), kv (B, n, H, 2, d), blank (H, 2, d), weight (H, 5) and bias (H,), tokens as the case has."""
    heads, d = case.heads, case.dim // case.heads
    shapes = {"query": (case.n, heads, d), "kv": (case.n, heads, 2, d)}
    made = {name: case.normal(name, *shape, dtype=dtype) for name, shape in shapes.items()}
    for name, shape in {"blank": (heads, 2, d), "weight": (heads, 5), "bias": (heads,)}.items():
        made[name] = (case.normal(name, *shape)[0] * (0.1 if name == "weight" else 1)).to(dtype)
    return made


def by_path(inputs, geometry):
    """The operator, on tokens as the case has them."""
    rows = [geometry.to_clusters(inputs[name]) for name in NAMES[:2]]
    out = neighborhood_attention(*rows, *(inputs[name] for name in NAMES[2:]), geometry.renumbered())
    return geometry.from_clusters(out)


def by_definition(inputs, geometry):
    """``local_attention`` in the dtype of the inputs."""
    position = geometry.relative.to(inputs["weight"].dtype) @ inputs["weight"].T + inputs["bias"]
    slots = geometry.neighbors, geometry.valid, position
    return local_attention(inputs["query"], *inputs["kv"].unbind(3), *slots, *inputs["blank"].unbind(1))


def with_gradients(function, inputs, geometry, grad_out):
    """Result, and gradients by name; of weight and bias as one: the bias's may be nearly 0, no baseline then."""
    inputs = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    out = function(inputs, geometry)
    *grads, weight, bias = torch.autograd.grad(out, list(inputs.values()), grad_out.to(out.dtype))
    return out.detach(), dict(zip(NAMES, grads, strict=False)) | {"weight, bias": torch.column_stack([weight, bias])}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_result_agrees(case, dtype, path):
    inputs = inputs_for(case, dtype)
    with dispatch.force(attention=path), torch.no_grad():
        geometry = case.fast_geometry(torch.float64)
        got = by_path(inputs, geometry)
        oracle = by_definition({name: x.double() for name, x in inputs.items()}, geometry)
        baseline = by_definition(inputs, geometry)
    assert_parity(got, oracle.numpy(), baseline, dtype, name=f"attention, {path}")


# "clusters" not of one token alone: the gradient of a logit is then the difference of two nearly equal float32 numbers,
# one of them taken from ``out``, and the query's gradient is off by 1.3 times what is allowed. Gradcheck has it.
GRADIENTS = [(path, case) for path in PATHS for case in SMALL if (path, case.name) != ("clusters", "one_token")]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(("path", "case"), GRADIENTS, ids=str)
def test_gradients_agree(path, case, dtype):
    inputs = inputs_for(case, dtype)
    grad_out = case.normal("grad_out", case.n, case.heads, case.dim // case.heads, dtype=dtype)
    with dispatch.force(attention=path):
        geometry = case.fast_geometry(torch.float64)
        _, got = with_gradients(by_path, inputs, geometry, grad_out)
    wide = {name: x.double() for name, x in inputs.items()}
    _, oracle = with_gradients(by_definition, wide, geometry, grad_out)
    _, baseline = with_gradients(by_definition, inputs, geometry, grad_out)
    oracle = {name: x.numpy() for name, x in oracle.items()}
    assert_layers(got, oracle, baseline, dtype, GRADIENT, name=f"attention gradient, {path}")


@pytest.mark.parametrize("path", PATHS)
def test_geometry_of_one_serves_a_batch(path):
    case = next(case for case in CASES if case.name == "n_not_multiple_of_m")
    inputs = {name: x for name, x in inputs_for(case, torch.float64).items()}
    for name in NAMES[:2]:
        inputs[name] = torch.cat([inputs[name], -inputs[name], inputs[name].flip(1)])
    with dispatch.force(attention=path):
        geometry = case.fast_geometry(torch.float64)
        together = by_path(inputs, geometry)
        alone = [by_path(inputs | {n: inputs[n][i : i + 1] for n in NAMES[:2]}, geometry) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("path", [path for path in PATHS if path != "plain"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_empty_places_neither_give_nor_take(case, path):
    """What stands in the empty places of a short cluster, and what gradient comes from there, changes nothing."""
    inputs = inputs_for(case, torch.float64)
    results = []
    for filling in (0.0, 3.0):
        with dispatch.force(attention=path):
            geometry = case.fast_geometry(torch.float64)
        there = (geometry.members.flatten(1) >= 0)[..., None, None]
        query, kv = geometry.to_clusters(inputs["query"]), geometry.to_clusters(inputs["kv"])
        rows = [torch.where(there, query, filling), torch.where(there[..., None], kv, filling)]
        rest = [inputs[name] for name in NAMES[2:]]
        leaves = [x.clone().requires_grad_() for x in (*rows, *rest)]
        out = neighborhood_attention(*leaves, geometry.renumbered())
        grads = torch.autograd.grad((out * torch.where(there, out.detach(), 0)).sum(), leaves)
        tokens = [geometry.from_clusters(x) for x in (out.detach(), *grads[:2])]
        results.append([*tokens, *grads[2:]])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
