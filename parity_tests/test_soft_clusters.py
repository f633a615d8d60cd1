"""Soft clusters: candidates, assignment and decoding, their gradients, and the corners of the cosine."""

import numpy as np
import pytest
import torch

import fast.soft_clusters
import reference.soft_clusters
from parity_tests import plain_heads
from parity_tests.cases import DTYPES, LOW, SMALL, TINY, case_named
from parity_tests.compare import GRADIENT, assert_equal, assert_layers, assert_parity
from parity_tests.gradients import assert_directional, assert_gradcheck, backward, flat
from parity_tests.weights import fill, tensors

ODD, BATCH = case_named("odd_channels"), case_named("last_cluster_of_one")
COARSE_DIM = 7


def setting(case, dtype=torch.float64):
    """A module, its weights, fine tokens and every third of them as merged tokens: positions, features."""
    module = fast.soft_clusters.SoftAssignment(case.dim, COARSE_DIM)
    weights = fill(module, seed=6, dtype=dtype)
    positions, fine = case.positions(), case.normal("fine", case.n, case.dim, dtype=dtype)
    coarse_positions = positions[:, ::3]
    coarse = case.normal("coarse", coarse_positions.shape[1], COARSE_DIM, dtype=dtype)
    return module.to(dtype), weights, positions, fine, coarse_positions, coarse


def low_assignment(fine, coarse, candidates, low):
    """The baseline of a batch, all of it in the dtype of the tokens."""
    columns = zip(candidates, fine, coarse, strict=True)
    return torch.stack([plain_heads.soft_assignment(c, f, m, low) for c, f, m in columns])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_soft_assignment_agrees(case, dtype, device):
    module, weights, positions, fine, coarse_positions, coarse = setting(case, dtype)
    moved = torch.from_numpy(positions), fine, torch.from_numpy(coarse_positions), coarse
    with torch.no_grad():
        candidates, got = module.to(device)(*(x.to(device) for x in moved), case.grid_size)
    columns = positions, fine.double().numpy(), coarse_positions, coarse.double().numpy()
    pairs = [reference.soft_clusters.soft_assignment(*c, weights) for c in zip(*columns, strict=True)]
    chosen, oracle = (np.stack(x) for x in zip(*pairs, strict=True))
    assert chosen.shape[2] == min(9, coarse.shape[1])
    assert_equal(candidates, chosen, name="soft_assignment: candidates")
    baseline = low_assignment(fine, coarse, chosen, tensors(weights, dtype))
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert_parity(got.to(dtype), oracle, baseline, dtype, name="soft_assignment")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_decode_clusters_agrees(case, dtype, device):
    _, weights, positions, fine, coarse_positions, coarse = setting(case, dtype)
    columns = positions, fine.double().numpy(), coarse_positions, coarse.double().numpy()
    pairs = [reference.soft_clusters.soft_assignment(*c, weights) for c in zip(*columns, strict=True)]
    candidates, assignment = (torch.from_numpy(np.stack(x)) for x in zip(*pairs, strict=True))
    assignment, values = assignment.to(dtype), case.normal("values", coarse.shape[1], 5, dtype=dtype)
    got = fast.soft_clusters.decode_clusters(*(x.to(device) for x in (values, candidates, assignment)))
    columns = values.double().numpy(), candidates.numpy(), assignment.double().numpy()
    oracle = [reference.soft_clusters.decode_clusters(*c) for c in zip(*columns, strict=True)]
    baseline = [plain_heads.decode_clusters(*c) for c in zip(values, candidates, assignment, strict=True)]
    assert_parity(got, np.stack(oracle), torch.stack(baseline), dtype, name="decode_clusters")


@pytest.mark.parametrize("case", [TINY, ODD, BATCH], ids=str)
def test_gradients_agree_with_central_differences_of_the_reference(case):
    module, weights, positions, fine, coarse_positions, coarse = setting(case)
    tensor = torch.from_numpy(positions), torch.from_numpy(coarse_positions)
    grad_out = case.normal("grad_out", case.n, min(9, coarse.shape[1]))

    def run(i):
        return module(tensor[0], i["fine"], tensor[1], i["coarse"], case.grid_size)[1]

    def output(i):
        columns = zip(positions, i["fine"], coarse_positions, i["coarse"], strict=True)
        return np.stack([reference.soft_clusters.soft_assignment(*c, i)[1] for c in columns])

    inputs = {"fine": fine, "coarse": coarse}
    gradients = backward(module, inputs, run, grad_out)
    at = {name: value.numpy() for name, value in inputs.items()} | {k: v for k, v in weights.items() if k not in inputs}
    assert_directional(gradients, output, at, grad_out.numpy(), name="soft_assignment gradient")


@pytest.mark.parametrize("dtype", LOW[:1], ids=str)
@pytest.mark.parametrize("case", [TINY, ODD, BATCH], ids=str)
def test_every_element_of_the_gradients_agrees(case, dtype):
    module, weights, positions, fine, coarse_positions, coarse = setting(case, dtype)
    tensor = torch.from_numpy(positions), torch.from_numpy(coarse_positions)
    grad_out = case.normal("grad_out", case.n, min(9, coarse.shape[1]), dtype=dtype)
    inputs = {"fine": fine, "coarse": coarse}
    got = backward(
        module, inputs, lambda i: module(tensor[0], i["fine"], tensor[1], i["coarse"], case.grid_size)[1], grad_out
    )
    candidates = fast.soft_clusters.nearest_tokens(*tensor, 9)
    start = {**inputs, **tensors(weights, dtype)}
    references = [
        flat(start, lambda i: low_assignment(i["fine"], i["coarse"], candidates, i), grad_out, d)
        for d in (torch.float64, dtype)
    ]
    assert_layers(got, *references, dtype, GRADIENT, name="soft_assignment gradient")


def test_gradcheck():
    module, _, positions, fine, coarse_positions, coarse = setting(TINY)
    tensor = torch.from_numpy(positions), torch.from_numpy(coarse_positions)
    candidates, assignment = module(tensor[0], fine, tensor[1], coarse, TINY.grid_size)
    values = TINY.normal("values", coarse.shape[1], 2)
    decode = fast.soft_clusters.decode_clusters
    assert_gradcheck(lambda v, a: decode(v, candidates, a), values, assignment)


@pytest.mark.parametrize("temperature", [0.1, -0.1, 0.0, 1e-30])
def test_twins_agree_at_any_temperature(temperature):
    """Its sign does not matter; at 0 the nearest in angle takes all, and nothing overflows."""
    module, weights, positions, fine, coarse_positions, coarse = setting(ODD)
    with torch.no_grad():
        module.temperature.fill_(temperature)
        columns = torch.from_numpy(positions), fine, torch.from_numpy(coarse_positions), coarse
        got = module(*columns, ODD.grid_size)[1]
    weights["temperature"] = np.array([temperature])
    oracle = reference.soft_clusters.soft_assignment(
        positions[0], fine[0].numpy(), coarse_positions[0], coarse[0].numpy(), weights
    )[1]
    np.testing.assert_allclose(got[0], oracle, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(got.sum(dim=-1), torch.ones_like(got[..., 0]))


def test_a_token_without_direction_shares_evenly_and_learns():
    module, weights, positions, fine, coarse_positions, coarse = setting(ODD)
    fine = fine.index_fill(1, torch.tensor([4]), 0).requires_grad_()
    columns = torch.from_numpy(positions), fine, torch.from_numpy(coarse_positions), coarse
    assignment = module(*columns, ODD.grid_size)[1]
    torch.testing.assert_close(assignment[0, 4], torch.full((9,), 1 / 9, dtype=torch.float64))
    assignment.square().sum().backward()
    assert fine.grad.isfinite().all()
    exact = positions[0], fine[0].detach().numpy(), coarse_positions[0], coarse[0].numpy()
    np.testing.assert_allclose(reference.soft_clusters.soft_assignment(*exact, weights)[1][4], 1 / 9)


@pytest.mark.parametrize("twin", ["reference", "fast"])
def test_decoding_keeps_constants_and_stays_within_the_candidates(twin):
    module, weights, positions, fine, coarse_positions, coarse = setting(ODD)
    exact = positions[0], fine[0].numpy(), coarse_positions[0], coarse[0].numpy()
    candidates, assignment = reference.soft_clusters.soft_assignment(*exact, weights)
    values = np.stack([np.ones(len(exact[2])), np.arange(len(exact[2]))], axis=1)
    if twin == "fast":
        given = (torch.from_numpy(x)[None] for x in (values, candidates, assignment))
        out = fast.soft_clusters.decode_clusters(*given)[0].numpy()
    else:
        out = reference.soft_clusters.decode_clusters(values, candidates, assignment)
    np.testing.assert_allclose(out[:, 0], 1)
    assert (out[:, 1] >= candidates.min(axis=1)).all() and (out[:, 1] <= candidates.max(axis=1)).all()


def test_batch_does_not_matter():
    module, _, positions, fine, coarse_positions, coarse = setting(BATCH)
    columns = torch.from_numpy(positions), fine, torch.from_numpy(coarse_positions), coarse
    with torch.no_grad():
        whole = module(*columns, BATCH.grid_size)
        for i in range(BATCH.batch):
            candidates, assignment = module(*(x[i : i + 1] for x in columns), BATCH.grid_size)
            assert torch.equal(candidates[0], whole[0][i])
            torch.testing.assert_close(assignment[0], whole[1][i], rtol=1e-12, atol=1e-13)
