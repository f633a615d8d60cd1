"""PointConv: numbers and gradients, fewer tokens than nine, and from which side the relative position is seen."""

import numpy as np
import pytest
import torch

import fast.pointconv
import reference.pointconv
from parity_tests import plain_heads
from parity_tests.cases import DTYPES, LOW, SMALL, TINY, Case, case_named
from parity_tests.compare import GRADIENT, assert_layers, assert_parity
from parity_tests.gradients import assert_directional, backward, flat
from parity_tests.weights import fill, tensors

ODD, BATCH = case_named("odd_channels"), case_named("last_cluster_of_one")
FEW = [Case(f"{n}_tokens", (4, 4), n, dim=6, batch=2) for n in (1, 2, 8, 9, 10)]


def module_for(case, dtype, seed=5):
    """A PointConv to 7 channels, with its weights for the reference."""
    module = fast.pointconv.PointConv(case.dim, 7)
    weights = fill(module, seed=seed, dtype=dtype)
    return module.to(dtype), weights


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL + FEW, ids=str)
def test_twins_agree(case, dtype, device):
    module, weights = module_for(case, dtype)
    positions, features = case.positions(), case.normal("f", case.n, case.dim, dtype=dtype)
    with torch.no_grad():
        got = module.to(device)(torch.from_numpy(positions).to(device), features.to(device), case.grid_size)
    columns = zip(positions, features.double().numpy(), strict=True)
    oracle = np.stack([reference.pointconv.pointconv(*c, weights) for c in columns])
    low = tensors(weights, dtype)
    baseline = [plain_heads.pointconv(*c, low) for c in zip(positions, features, strict=True)]
    assert_parity(got, oracle, torch.stack(baseline), dtype, name="pointconv")


@pytest.mark.parametrize("case", [TINY, ODD, BATCH], ids=str)
def test_gradients_agree_with_central_differences_of_the_reference(case):
    module, weights = module_for(case, torch.float64)
    positions, features = case.positions(), case.normal("f", case.n, case.dim)
    grad_out = case.normal("grad_out", case.n, 7)

    def run(inputs):
        return module(torch.from_numpy(positions), inputs["features"], case.grid_size)

    def output(inputs):
        columns = zip(positions, inputs["features"], strict=True)
        return np.stack([reference.pointconv.pointconv(*c, inputs) for c in columns])

    gradients = backward(module, {"features": features}, run, grad_out)
    at = {"features": features.numpy(), **weights}
    assert_directional(gradients, output, at, grad_out.numpy(), name="pointconv gradient")


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("case", [TINY, ODD, BATCH], ids=str)
def test_every_element_of_the_gradients_agrees(case, dtype):
    module, weights = module_for(case, dtype)
    positions, features = case.positions(), case.normal("f", case.n, case.dim, dtype=dtype)
    grad_out = case.normal("grad_out", case.n, 7, dtype=dtype)

    def run(inputs):
        return module(torch.from_numpy(positions), inputs["features"], case.grid_size)

    def formula(inputs):
        return torch.stack([plain_heads.pointconv(*c, inputs) for c in zip(positions, inputs["features"], strict=True)])

    got = backward(module, {"features": features}, run, grad_out)
    start = {"features": features, **tensors(weights, dtype)}
    references = [flat(start, formula, grad_out, d) for d in (torch.float64, dtype)]
    assert_layers(got, *references, dtype, GRADIENT, name="pointconv gradient")


@pytest.mark.parametrize("twin", ["reference", "fast"])
def test_relative_position_is_that_of_the_token_seen_from_its_neighbour(twin):
    """Two tokens, the second of feature 1: the first sees it from the right, at p_0 - p_1 = (-2, 0)."""
    module, weights = module_for(Case("two", (1, 3), 2, dim=1), torch.float64)
    positions, features = np.array([[0, 0], [2, 0]]), np.array([[0.0], [1.0]])
    seen = torch.tensor([[-2.0, 0, 2, 0, -1]], dtype=torch.float64)  # dx, dy, distance, sine, cosine
    with torch.no_grad():
        expected = module.linear(module.norm(module.weight_net(seen)))[0].numpy()
        if twin == "fast":
            out = module(torch.from_numpy(positions)[None], torch.from_numpy(features)[None], (1, 3))[0].numpy()
        else:
            out = reference.pointconv.pointconv(positions, features, weights)
    np.testing.assert_allclose(out[0], expected, rtol=1e-10)


@pytest.mark.parametrize("twin", ["reference", "fast"])
def test_inside_the_grid_it_moves_with_the_picture(twin):
    """The nine nearest of an inner cell are its 3 x 3 surroundings, so PointConv is a convolution there."""
    case = Case("grid", (8, 9), dim=3)
    module, weights = module_for(case, torch.float64)
    features, moved = np.random.default_rng(6).standard_normal((2, 8, 9, 3))
    moved[1:, 1:] = features[:-1, :-1]
    outs = []
    for picture in (features, moved):
        x, positions = picture.reshape(-1, 3), case.positions()
        if twin == "fast":
            with torch.no_grad():
                out = module(torch.from_numpy(positions), torch.from_numpy(x)[None], case.grid_size)[0].numpy()
        else:
            out = reference.pointconv.pointconv(positions[0], x, weights)
        outs.append(out.reshape(8, 9, 7))
    np.testing.assert_allclose(outs[1][2:-1, 2:-1], outs[0][1:-2, 1:-2], rtol=1e-12, atol=1e-12)


def test_batch_does_not_matter():
    module, _ = module_for(BATCH, torch.float64)
    positions, features = torch.from_numpy(BATCH.positions()), BATCH.normal("f", BATCH.n, BATCH.dim)
    with torch.no_grad():
        whole = module(positions, features, BATCH.grid_size)
        for i in range(BATCH.batch):
            alone = module(positions[i : i + 1], features[i : i + 1], BATCH.grid_size)
            torch.testing.assert_close(alone[0], whole[i], rtol=1e-12, atol=1e-13)
