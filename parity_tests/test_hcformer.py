"""Point-based HCFormer: masks climb through the soft clusters, and the whole head from the stages' tokens on."""

import numpy as np
import pytest
import torch

import fast
import fast.hcformer
import reference.backbone
import reference.hcformer
import reference.mask2former
from parity_tests.cases import DTYPES
from parity_tests.compare import assert_parity
from parity_tests.gradients import assert_directional, assert_gradcheck
from parity_tests.heads import pictures, predictions, segmenter
from parity_tests.plain_heads import decode_clusters
from reference.layers import subset

SIZES = (40, 14, 6, 3)  # tokens of four stages
DIMS = (16, 32, 48, 64)


def chain(dtype=torch.float64, batch=2):
    """Random assignments of three merges, each of up to 9 candidates, and masks (B, q, n_last)."""
    rng, assignments = np.random.default_rng(3), []
    for fine, coarse in zip(SIZES[:-1], SIZES[1:], strict=True):
        k = min(9, coarse)
        candidates = np.stack([[rng.permutation(coarse)[:k] for _ in range(fine)] for _ in range(batch)])
        weight = torch.from_numpy(rng.random((batch, fine, k))).softmax(dim=-1).to(dtype)
        assignments.append((torch.from_numpy(candidates), weight))
    return torch.from_numpy(rng.standard_normal((batch, 5, SIZES[-1]))).to(dtype), assignments


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_climb_agrees(dtype, device):
    masks, assignments = chain(dtype)
    got = fast.hcformer.climb(masks.to(device), [(c.to(device), a.to(device)) for c, a in assignments])
    oracle, baseline = [], []
    for i, mask in enumerate(masks):
        pairs = [(c[i], a[i]) for c, a in assignments]
        exact = [(c.numpy(), a.double().numpy()) for c, a in pairs]
        oracle.append(reference.hcformer.climb(mask.double().numpy(), exact))
        values = mask.T
        for candidates, assignment in reversed(pairs):
            values = decode_clusters(values, candidates, assignment)
        baseline.append(values.T)
    assert_parity(got, np.stack(oracle), torch.stack(baseline), dtype, name="climb")


def test_climb_is_the_product_of_the_assignment_matrices():
    """As dense matrices (n, K): masks times A3^T, A2^T, A1^T; so each step's rows, and the product's, sum to 1."""
    masks, assignments = chain(batch=1)
    expected, ones = masks[0], torch.ones(1, SIZES[-1], dtype=torch.float64)
    for candidates, weight in reversed(assignments):
        dense = torch.zeros(*weight.shape[1:2], int(candidates.max()) + 1, dtype=torch.float64)
        dense = dense.scatter_add(1, candidates[0], weight[0])
        expected = expected @ dense.T
    got = fast.hcformer.climb(masks, assignments)
    torch.testing.assert_close(got[0], expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(fast.hcformer.climb(ones[None], assignments), torch.ones(1, 1, SIZES[0]).double())


def test_gradcheck_of_climb():
    masks, assignments = chain(batch=1)
    candidates = [c for c, _ in assignments]
    given = masks[:, :2], *(a for _, a in assignments)
    assert_gradcheck(lambda m, *a: fast.hcformer.climb(m, list(zip(candidates, a, strict=True)))[..., ::7], *given)


def stages_of(model, weights, image):
    """The reference's stages and token sets of one image."""
    part = subset(weights, "backbone")
    config = reference.backbone.Config(**vars(model.backbone.config))
    stages = reference.backbone.forward_features(config, part, image)
    return stages, reference.backbone.token_sets(part, stages)


@pytest.mark.parametrize("options", [{}, {"num_queries": 33}, {"decoder_layers": 1}], ids=str)
@pytest.mark.parametrize("height, width", [(64, 64), (40, 68)])
def test_twins_agree_in_float64(height, width, options):
    model, weights = segmenter("hcformer", **options)
    batch = pictures(height, width)
    with torch.no_grad():
        got = predictions(model.double()(torch.from_numpy(batch), output_auxiliary_logits=True))
    head = reference.mask2former.HeadConfig(**vars(model.config))
    for i, image in enumerate(batch):
        stages, sets = stages_of(model, weights, image)
        expected = reference.hcformer.forward(stages, sets, (height // 4, width // 4), weights, head)
        assert len(expected) == len(got) == model.config.decoder_layers + 1
        for ours, theirs in zip(got, expected, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(a[i], b, rtol=1e-8, atol=1e-9)


def test_gradient_agrees_with_central_differences_of_the_reference():
    """The backbone stands still: of the head's weights alone, to the masks' and classes' logits of all layers."""
    model, weights = segmenter("hcformer", decoder_layers=2)
    model, image = model.double(), pictures(32, 44, batch=1)
    names = ("temperature", "fine.weight", "coarse_norm.bias", "mask_features.weight", "query_features.weight")
    chosen = [k for k in weights if k.endswith(names) and not k.startswith("backbone.")]
    rng, out = np.random.default_rng(1), predictions(model(torch.from_numpy(image)))
    flat = torch.cat([x.flatten() for pair in out for x in pair])
    grad_out = torch.from_numpy(rng.standard_normal(len(flat)))
    flat.backward(grad_out)
    gradients = {name: model.get_parameter(name).grad for name in chosen}
    stages, sets = stages_of(model, weights, image[0])
    head = reference.mask2former.HeadConfig(**vars(model.config))

    def output(inputs):
        pairs = reference.hcformer.forward(stages, sets, (8, 11), inputs, head)
        return np.concatenate([x.ravel() for pair in pairs for x in pair])

    assert len(chosen) == 11
    assert_directional(gradients, output, weights, grad_out.numpy(), name="hcformer gradient")


def test_candidates_are_merged_tokens_of_the_same_stage():
    model, weights = segmenter("hcformer")
    _, sets = model.backbone.run_token_sets(torch.from_numpy(pictures(64, 64)).float())
    sizes = [t.features.shape[1] for t in sets]
    assert sizes == [256, 64, 16, 4] and [t.features.shape[2] for t in sets] == list(DIMS)
    assert [a.fine.in_features for a in model.assignments] == list(DIMS[:-1])
    assert [a.coarse.in_features for a in model.assignments] == list(DIMS[1:])
