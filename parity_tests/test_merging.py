"""Neighbourhood merging: numbers and gradients; tokens that are not kept still get a gradient."""

import numpy as np
import pytest
import torch

import fast.merging
import reference.merging
from fast import ops
from parity_tests import plain
from parity_tests.cases import DTYPES, LOW, SMALL, TINY, case_named
from parity_tests.compare import GRADIENT, assert_layers, assert_parity
from parity_tests.gradients import assert_directional, assert_gradcheck, backward, flat
from parity_tests.weights import fill, tensors

ODD = case_named("odd_channels")
BATCH = case_named("last_cluster_of_one")


def tokens(case, dtype=torch.float64):
    """Features (B, n, C), scores in (0, 1) (B, n), and the indices of every third token, in raster order (B, K)."""
    kept = torch.arange(0, case.n, 3).expand(case.batch, -1)
    return case.normal("f", case.n, case.dim, dtype=dtype), case.normal("s", case.n).sigmoid().to(dtype), kept


def module_for(case, dtype, seed=4):
    """A Merging module to 10 channels, with its weights for the reference."""
    module = fast.merging.Merging(case.dim, 10).to(dtype)
    return module, fill(module, seed=seed, dtype=dtype)


def per_image(function, case, *columns):
    """Call ``function(*values, geometry)`` for each image of the columns."""
    return [function(*values, g) for *values, g in zip(*columns, case.reference_geometry(), strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_merge_neighborhoods_agrees(case, dtype, device):
    features, scores, kept = tokens(case, dtype)
    geometry = case.fast_geometry()
    neighbors = geometry.neighbors[:, ::3]
    slots = case.normal("slots", *neighbors.shape[1:], 4, dtype=dtype)
    got = fast.merging.merge_neighborhoods(*(x.to(device) for x in (features, scores, neighbors, slots)))
    columns = [features, scores, neighbors, slots]
    exact = [
        (f.double().numpy(), s.double().numpy(), j.numpy(), w.double().numpy())
        for f, s, j, w in zip(*columns, strict=True)
    ]
    oracle = np.stack([reference.merging.merge_neighborhoods(*e) for e in exact])
    baseline = torch.stack([plain.merge_neighborhoods(*c) for c in zip(*columns, strict=True)])
    assert_parity(got, oracle, baseline, dtype, name="merge_neighborhoods")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_slot_weights_agree(case, dtype, device):
    module, weights = module_for(case, dtype)
    part, geometry = plain.subset(weights, "weight_net"), case.fast_geometry(torch.float64, device)
    parameters = ops.parameter_matrix(module.to(device).weight_net)
    got = fast.merging.slot_weights(geometry.relative.to(dtype), geometry.valid, parameters)
    exact = case.reference_geometry()
    oracle = np.stack([reference.merging.slot_weights(g.relative, g.valid, part) for g in exact])
    rounded = [torch.from_numpy(g.relative).to(dtype) for g in exact]
    baseline = [plain.slot_weights(r, g.valid, tensors(part, dtype)) for r, g in zip(rounded, exact, strict=True)]
    assert_parity(got, oracle, torch.stack(baseline), dtype, name="slot_weights")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_merging_agrees(case, dtype, device):
    module, weights = module_for(case, dtype)
    features, scores, kept = tokens(case, dtype)
    geometry = case.fast_geometry(torch.float64, device)
    got = module.to(device)(features.to(device), scores.to(device), kept.to(device), geometry)
    columns = features.double().numpy(), scores.double().numpy(), kept.numpy()
    oracle = per_image(lambda *a: reference.merging.merging(*a, weights), case, *columns)
    low = tensors(weights, dtype)
    baseline = per_image(lambda *a: plain.merging(*a, low), case, features, scores, kept.numpy())
    assert_parity(got, np.stack(oracle), torch.stack(baseline), dtype, name="merging")


@pytest.mark.parametrize("case", [TINY, ODD, BATCH], ids=str)
def test_gradients_agree_with_central_differences_of_the_reference(case):
    module, weights = module_for(case, torch.float64)
    features, scores, kept = tokens(case)
    grad_out, geometry = case.normal("grad_out", kept.shape[1], 10), case.fast_geometry(torch.float64)

    def output(inputs):
        columns = inputs["features"], inputs["scores"], kept.numpy()
        return np.stack(per_image(lambda *a: reference.merging.merging(*a, inputs), case, *columns))

    inputs = {"features": features, "scores": scores}
    gradients = backward(module, inputs, lambda i: module(i["features"], i["scores"], kept, geometry), grad_out)
    at = {name: value.numpy() for name, value in inputs.items()} | weights
    assert_directional(gradients, output, at, grad_out.numpy(), name="merging gradient")


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("case", [TINY, ODD, BATCH], ids=str)
def test_every_element_of_the_gradients_agrees(case, dtype, device):
    module, weights = module_for(case, dtype)
    features, scores, kept = tokens(case, dtype)
    grad_out, geometry = (
        case.normal("upstream", kept.shape[1], 10, dtype=dtype),  # a seed of which the baseline in bfloat16 is fair
        case.fast_geometry(torch.float64, device),
    )
    inputs = {"features": features.to(device), "scores": scores.to(device)}
    run = module.to(device)
    got = backward(
        run, inputs, lambda i: run(i["features"], i["scores"], kept.to(device), geometry), grad_out.to(device)
    )

    def formula(i):
        return torch.stack(per_image(lambda *a: plain.merging(*a, i), case, i["features"], i["scores"], kept.numpy()))

    start = {"features": features, "scores": scores, **tensors(weights, dtype)}
    references = [flat(start, formula, grad_out, d) for d in (torch.float64, dtype)]
    assert_layers(got, *references, dtype, GRADIENT, name="merging gradient")


def test_gradcheck():
    features, scores, _ = tokens(TINY)
    neighbors = TINY.fast_geometry().neighbors[:, ::3]
    slots = TINY.normal("slots", *neighbors.shape[1:], 4)
    assert_gradcheck(lambda f, s, w: fast.merging.merge_neighborhoods(f, s, neighbors, w), features, scores, slots)


def test_every_token_of_a_neighbourhood_gets_a_gradient():
    module, _ = module_for(ODD, torch.float64)
    features, scores, kept = tokens(ODD)
    geometry, scores = ODD.fast_geometry(torch.float64), scores.requires_grad_()
    module(features, scores, kept[:, :2], geometry).square().sum().backward()
    rows = geometry.neighbors[0, kept[0, :2]], geometry.valid[0, kept[0, :2]]
    seen = set(rows[0][rows[1]].tolist())
    assert set(scores.grad[0].nonzero().flatten().tolist()) == seen
    assert len(seen) > 2  # more than those kept


@pytest.mark.parametrize("twin", ["reference", "fast"])
def test_a_token_of_no_importance_leaves_no_trace(twin):
    features, scores, _ = tokens(ODD)
    neighbors = ODD.fast_geometry().neighbors
    slots = ODD.normal("slots", *neighbors.shape[1:], 4)
    scores[:, 7] = 0
    results = []
    for value in (1.0, 1e6):
        features[:, 7] = value
        if twin == "fast":
            results.append(fast.merging.merge_neighborhoods(features, scores, neighbors, slots).numpy())
        else:
            arguments = (x[0].numpy() for x in (features, scores, neighbors, slots))
            results.append(reference.merging.merge_neighborhoods(*arguments))
    assert (results[0] == results[1]).all()


def test_layout_is_four_times_channels():
    """One token, one slot of weight (1, 2, 3, 4), importance 1/2: each weight's copy of f lies in one piece."""
    f, s, j = torch.tensor([[[10.0, 20.0]]]), torch.tensor([[0.5]]), torch.zeros(1, 1, 1, dtype=torch.int64)
    w = torch.tensor([1.0, 2, 3, 4]).view(1, 1, 1, 4)
    expected = [5, 10, 10, 20, 15, 30, 20, 40]
    assert fast.merging.merge_neighborhoods(f, s, j, w).flatten().tolist() == expected
    assert reference.merging.merge_neighborhoods(*(x[0].numpy() for x in (f, s, j, w))).ravel().tolist() == expected
