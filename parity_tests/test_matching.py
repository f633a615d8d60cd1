"""Matching and the losses of pairs: numbers and gradients, and costs equal to those of transformers."""

from itertools import permutations

import numpy as np
import pytest
import torch

import fast.matching
import reference.matching
from parity_tests.compare import GRADIENT, assert_layers, assert_parity
from parity_tests.gradients import assert_directional, assert_gradcheck, flat

QUERIES, CLASSES, POINTS = 7, 4, 50
LOW = [torch.float64, torch.float32]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("size", [(5, 8), (1, 1), (1, 13)], ids=str)
def test_sample_points_agrees(size, dtype, device):
    """Also on the border, where half of what is read lies outside and is zero."""
    maps = draw(3, *size, dtype=dtype)
    points = torch.from_numpy(np.random.default_rng(1).random((40, 2))).to(dtype)
    points[:6] = torch.tensor([[0, 0], [1, 1], [0.5, 0], [0, 0.5], [0.5, 0.5], [1, 0]])
    got = fast.matching.sample_points(maps.to(device), points.to(device))
    oracle = reference.matching.sample_points(maps.double().numpy(), points.double().numpy())
    baseline = reference.matching.sample_points(maps.numpy(), points.numpy())
    assert_parity(got, oracle, baseline, dtype, name="sample_points")
    own = fast.matching.sample_points(maps, points.expand(3, -1, -1).contiguous())
    torch.testing.assert_close(own, got.cpu(), rtol=0, atol=0)


def sampled(objects, dtype=torch.float64):
    """Class logits, mask logits at points, labels and targets, some of them between 0 and 1."""
    targets = torch.from_numpy(np.random.default_rng(2).integers(0, 5, (objects, POINTS)) / 4).to(dtype)
    labels = torch.arange(objects) % CLASSES
    masks = 3 * draw(QUERIES, POINTS, seed=3, dtype=dtype)
    masks[0, :2] = torch.tensor([400.0, -400.0])  # where a naive exponential overflows
    return draw(QUERIES, CLASSES + 1, seed=4, dtype=dtype), masks, labels, targets


def exact(values):
    return [v.double().numpy() if v.is_floating_point() else v.numpy() for v in values]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("objects", [0, 1, 5, 11])
def test_costs_and_pairs_agree(objects, dtype, device):
    given = sampled(objects, dtype)
    got = fast.matching.matching_costs(*(x.to(device) for x in given))
    oracle = reference.matching.matching_costs(*exact(given))
    baseline = reference.matching.matching_costs(*(x.numpy() for x in given))
    assert_parity(got, oracle, baseline, dtype, name="matching_costs")
    pairs = [x.tolist() for x in fast.matching.match(got)]
    assert pairs == [x.tolist() for x in reference.matching.match(oracle)]
    assert len(pairs[0]) == min(objects, QUERIES) and len(set(pairs[1])) == len(pairs[1])


def test_match_is_the_best_of_all_pairings():
    costs = np.random.default_rng(5).integers(0, 9, (6, 4))
    best = min(costs[list(p), range(4)].sum() for p in permutations(range(6), 4))
    for queries, objects in (reference.matching.match(costs), fast.matching.match(torch.from_numpy(costs))):
        assert costs[np.asarray(queries), np.asarray(objects)].sum() == best


def pairs_of(objects):
    """Three of the queries with three of the objects."""
    return torch.tensor([0, 2, 5])[:objects], torch.arange(3)[:objects]


def losses_of(twin, classes, masks, labels, targets, objects=3):
    """Class, mask and dice loss of one image in either twin, as a dict."""
    queries, found = pairs_of(objects)
    if twin is reference.matching:
        first = twin.class_loss(classes, queries.numpy(), labels[found.numpy()])
        queries, found = queries.numpy(), found.numpy()
    else:
        first = twin.class_loss(classes[None], [queries], [labels[found]])
    entropy, dice = twin.mask_losses(masks[queries], targets[found], 2.5)
    return {"class": first, "mask": entropy, "dice": dice}


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("objects", [0, 1, 3])
def test_losses_agree(objects, dtype, device):
    given = sampled(5, dtype)
    got = losses_of(fast.matching, *(x.to(device) for x in given), objects)
    oracle = losses_of(reference.matching, *exact(given), objects)
    baseline = losses_of(reference.matching, *(x.numpy() for x in given), objects)
    assert_layers(got, oracle, baseline, dtype, name="losses")


def test_gradients_agree_with_central_differences_of_the_reference():
    classes, masks, labels, targets = sampled(5)
    masks = masks.clamp(-9, 9)
    inputs = {"classes": classes.requires_grad_(), "masks": masks.requires_grad_()}
    losses = losses_of(fast.matching, classes, masks, labels, targets)
    weight = np.array([2.0, -1.0, 3.0])
    sum(w * v for w, v in zip(weight, losses.values(), strict=True)).backward()

    def output(i):
        values = losses_of(reference.matching, i["classes"], i["masks"], labels.numpy(), targets.numpy())
        return np.array(list(values.values()))

    gradients = {name: value.grad for name, value in inputs.items()}
    assert_directional(
        gradients, output, {k: v.detach().numpy() for k, v in inputs.items()}, weight, name="losses gradient"
    )


def test_every_element_of_the_gradients_agrees():
    classes, masks, labels, targets = sampled(5, torch.float32)
    start = {"classes": classes, "masks": masks}

    def total(i):
        return sum(losses_of(fast.matching, i["classes"], i["masks"], labels, targets.to(i["masks"].dtype)).values())

    references = [flat(start, total, torch.tensor(1.0), d) for d in (torch.float64, torch.float32)]
    inputs = {name: value.clone().requires_grad_() for name, value in start.items()}
    total(inputs).backward()
    got = {name: value.grad for name, value in inputs.items()}
    assert_layers(got, *references, torch.float32, GRADIENT, name="losses gradient")


def test_gradcheck():
    classes, masks, labels, targets = sampled(3)
    masks = masks[:, 2:8]
    assert_gradcheck(
        lambda c, m: tuple(losses_of(fast.matching, c, m, labels, targets[:, 2:8]).values()), classes, masks
    )
    points = torch.from_numpy(np.random.default_rng(1).random((5, 2)))
    assert_gradcheck(lambda m: fast.matching.sample_points(m, points), draw(2, 4, 5))


def test_costs_equal_those_of_transformers():
    pytest.importorskip("transformers")
    from transformers.models.mask2former import modeling_mask2former as theirs

    classes, masks, labels, targets = sampled(4, torch.float32)
    cost = -2 * classes.softmax(dim=-1)[:, labels]
    cost = cost + 5 * theirs.pair_wise_sigmoid_cross_entropy_loss(masks, targets)
    cost = cost + 5 * theirs.pair_wise_dice_loss(masks, targets)
    torch.testing.assert_close(fast.matching.matching_costs(classes, masks, labels, targets), cost)
