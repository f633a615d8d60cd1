"""Attention: numbers, masks and gradients, on every case, in every dtype."""

import numpy as np
import pytest
import torch

import fast.attention
import reference.attention
from parity_tests import plain
from parity_tests.cases import CASES, DTYPES, LOW, SMALL, TINY, case_named
from parity_tests.compare import GRADIENT, assert_layers, assert_parity
from parity_tests.gradients import assert_directional, backward, flat
from parity_tests.weights import fill, tensors

ODD = case_named("odd_channels")
BATCH = case_named("last_cluster_of_one")


def parts(case, dtype):
    """Random query, key, value (B, n, H, d), bias (B, n, M, H), blank key and value (H, d), and the geometry."""
    d, geometry = case.dim // case.heads, case.fast_geometry(torch.float64)
    shapes = dict.fromkeys(("query", "key", "value"), (case.n, case.heads, d))
    shapes["bias"] = (*geometry.neighbors.shape[1:], case.heads)
    values = {name: case.normal(name, *shape, dtype=dtype) for name, shape in shapes.items()}
    values |= {name: case.normal(name, case.heads, d, dtype=dtype)[0] for name in ("blank_key", "blank_value")}
    return values, geometry


def image(values, i):
    """The parts of image ``i``."""
    return {name: value if name.startswith("blank") else value[i] for name, value in values.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_local_attention_agrees(case, dtype, device):
    values, geometry = parts(case, dtype)
    valid = None if geometry.valid is None else geometry.valid.to(device)
    moved = {name: value.to(device) for name, value in values.items()}
    got = fast.attention.local_attention(neighbors=geometry.neighbors.to(device), valid=valid, **moved)
    oracle, baseline = [], []
    for i, g in enumerate(case.reference_geometry()):
        exact = {name: value.double().numpy() for name, value in image(values, i).items()}
        oracle.append(reference.attention.local_attention(neighbors=g.neighbors, valid=g.valid, **exact))
        baseline.append(plain.local_attention(neighbors=g.neighbors, valid=g.valid, **image(values, i)))
    assert_parity(got, np.stack(oracle), torch.stack(baseline), dtype, name="local_attention")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer_scale", [None, 1.0], ids=["unscaled", "layer_scale"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_and_block_agree(case, layer_scale, dtype, device):
    block = fast.attention.AttentionBlock(case.dim, case.heads, 2.0, layer_scale, 0.0)
    weights = fill(block, seed=2, dtype=dtype)
    block = block.to(device=device, dtype=dtype)
    x, geometry = case.normal("x", case.n, case.dim, dtype=dtype), case.fast_geometry(torch.float64, device)
    part = plain.subset(weights, "attention")
    oracle, baseline = {"attention": [], "block": []}, {"attention": [], "block": []}
    for features, g in zip(x, case.reference_geometry(), strict=True):
        exact = features.double().numpy()
        oracle["attention"].append(reference.attention.attention(exact, g, part, case.heads))
        oracle["block"].append(reference.attention.attention_block(exact, g, weights, case.heads))
        baseline["attention"].append(plain.attention(features, g, tensors(part, dtype), case.heads))
        baseline["block"].append(plain.attention_block(features, g, tensors(weights, dtype), case.heads))
    with torch.no_grad():
        got = {"attention": block.attention(x.to(device), geometry), "block": block(x.to(device), geometry)}
    oracle = {layer: np.stack(images) for layer, images in oracle.items()}
    baseline = {layer: torch.stack(images) for layer, images in baseline.items()}
    assert_layers(got, oracle, baseline, dtype, name="attention_block")


@pytest.mark.parametrize("case", [TINY, ODD, BATCH], ids=str)
def test_gradients_agree_with_central_differences_of_the_reference(case):
    block = fast.attention.AttentionBlock(case.dim, case.heads, 2.0, 1.0, 0.0).double()
    weights = fill(block, seed=3, dtype=torch.float64)
    x, grad_out = case.normal("x", case.n, case.dim), case.normal("grad_out", case.n, case.dim)
    geometry, exact = case.fast_geometry(torch.float64), case.reference_geometry()

    def output(inputs):
        rest = {name: value for name, value in inputs.items() if name != "x"}
        blocks = [
            reference.attention.attention_block(f, g, rest, case.heads) for f, g in zip(inputs["x"], exact, strict=True)
        ]
        return np.stack(blocks)

    gradients = backward(block, {"x": x}, lambda i: block(i["x"], geometry), grad_out)
    assert_directional(
        gradients, output, {"x": x.numpy(), **weights}, grad_out.numpy(), name="attention_block gradient"
    )


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("case", [TINY, ODD, BATCH], ids=str)
def test_every_element_of_the_gradients_agrees(case, dtype, device):
    """Oracle: plain PyTorch's gradients in float64; the test above ties those of fast to the reference."""
    block = fast.attention.AttentionBlock(case.dim, case.heads, 2.0, 1.0, 0.0)
    weights = fill(block, seed=3, dtype=dtype)
    block = block.to(device=device, dtype=dtype)
    x, grad_out = (case.normal(name, case.n, case.dim, dtype=dtype) for name in ("x", "grad_out"))
    geometry, exact = case.fast_geometry(torch.float64, device), case.reference_geometry()
    got = backward(block, {"x": x.to(device)}, lambda i: block(i["x"], geometry), grad_out.to(device))

    def formula(inputs):
        return torch.stack(
            [plain.attention_block(f, g, inputs, case.heads) for f, g in zip(inputs["x"], exact, strict=True)]
        )

    references = [flat({"x": x, **tensors(weights, d)}, formula, grad_out, d) for d in (torch.float64, dtype)]
    assert_layers(got, *references, dtype, GRADIENT, name="attention_block gradient")


def test_gradcheck():
    values, geometry = parts(TINY, torch.float64)
    names = list(values)
    inputs = [values[name].requires_grad_() for name in names]

    def function(*args):
        return fast.attention.local_attention(
            neighbors=geometry.neighbors, valid=geometry.valid, **dict(zip(names, args, strict=True))
        )

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("twin", ["reference", "fast"])
def test_a_neighbourhood_of_empty_slots_leaves_the_blank_token(twin):
    values, geometry = parts(TINY, torch.float64)
    valid = torch.zeros_like(geometry.neighbors, dtype=torch.bool)
    if twin == "fast":
        out = fast.attention.local_attention(neighbors=geometry.neighbors, valid=valid, **values)
    else:
        exact = {name: value.numpy() for name, value in image(values, 0).items()}
        out = reference.attention.local_attention(
            neighbors=geometry.neighbors[0].numpy(), valid=valid[0].numpy(), **exact
        )
        out = torch.from_numpy(out)
    assert torch.allclose(out, values["blank_value"].expand_as(out), rtol=1e-14)


def test_empty_slots_get_neither_weight_nor_gradient():
    values, geometry = parts(TINY, torch.float64)
    assert geometry.valid is not None and not geometry.valid.all()
    neighbors = torch.where(geometry.valid, geometry.neighbors, TINY.n)  # empty slots now point at a huge token
    for name in ("query", "key", "value"):
        last = torch.full_like(values[name][:, :1], 1e30)
        values[name] = torch.cat([values[name], last], dim=1).requires_grad_()
    pad = [torch.cat([x, torch.ones_like(x[:, :1])], dim=1) for x in (geometry.valid, values.pop("bias"))]
    neighbors = torch.cat([neighbors, torch.zeros_like(neighbors[:, :1])], dim=1)
    out = fast.attention.local_attention(neighbors=neighbors, valid=pad[0], bias=pad[1], **values)[:, :-1]
    assert out.abs().max() < 100
    out.sum().backward()
    assert not values["key"].grad[:, -1].any() and not values["value"].grad[:, -1].any()


def test_geometry_of_one_serves_a_batch():
    block = fast.attention.AttentionBlock(12, 2, 2.0, None, 0.0).double()
    fill(block, dtype=torch.float64)
    case = case_named("n_not_multiple_of_m")
    x = torch.from_numpy(case.generator("many").standard_normal((3, case.n, 12)))
    geometry = case.fast_geometry(torch.float64)
    alone = torch.cat([block(x[i : i + 1], geometry) for i in range(3)])
    torch.testing.assert_close(block(x, geometry), alone, rtol=1e-13, atol=1e-13)


def test_result_does_not_depend_on_the_slices(monkeypatch):
    values, geometry = parts(BATCH, torch.float64)
    whole = fast.attention.local_attention(neighbors=geometry.neighbors, valid=geometry.valid, **values)
    monkeypatch.setattr(
        fast.ops.attention.plain, "token_slices", lambda *_: [slice(i, i + 7) for i in range(0, BATCH.n, 7)]
    )
    sliced = fast.attention.local_attention(neighbors=geometry.neighbors, valid=geometry.valid, **values)
    torch.testing.assert_close(sliced, whole, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("twin", ["reference", "fast"])
def test_attention_is_blind_to_the_order_of_slots(twin):
    values, geometry = parts(ODD, torch.float64)
    shuffle = torch.from_numpy(ODD.generator("shuffle").permutation(geometry.neighbors.shape[2]))
    results = []
    for slots in (slice(None), shuffle):
        given = {**image(values, 0), "neighbors": geometry.neighbors[0][:, slots], "valid": geometry.valid[0][:, slots]}
        given["bias"] = given["bias"][:, slots]
        if twin == "reference":
            results.append(reference.attention.local_attention(**{k: v.numpy() for k, v in given.items()}))
        else:
            given = {k: v if k.startswith("blank") else v[None] for k, v in given.items()}
            results.append(fast.attention.local_attention(**given)[0].numpy())
    np.testing.assert_allclose(*results, atol=1e-14)


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    drop = fast.attention.DropPath(0.3)
    torch.manual_seed(0)
    out = drop(torch.ones(4000, 2, 3))
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert (out == out[:, :1, :1]).all() and abs(out.mean().item() - 1) < 0.03
    assert torch.equal(drop.eval()(torch.ones(5, 2)), torch.ones(5, 2))
