"""The loss of a segmenter: the reference's and transformers' at the same points; and what may be empty or go wrong."""

import numpy as np
import pytest
import torch

import fast.matching
import reference.matching
from fast.segmenter import SegmenterOutput

QUERIES, CLASSES, POINTS = 7, 4, 50


def draw(*shape, seed):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def scene(objects, seed=0, layers=2, size=(6, 9), masks_size=(24, 36)):
    """A SegmenterOutput with ``layers`` auxiliary predictions, and Objects: ``objects`` holds their number by image."""
    rng, batch, pairs = np.random.default_rng(seed), len(objects), []
    for layer in range(layers + 1):
        classes = draw(batch, QUERIES, CLASSES + 1, seed=(seed, layer, 0)).float() * 2
        pairs.append((classes, draw(batch, QUERIES, *size, seed=(seed, layer, 1)).float() * 3))
    names = "class_queries_logits", "masks_queries_logits"
    output = SegmenterOutput(*pairs[-1], [dict(zip(names, pair, strict=True)) for pair in pairs[:-1]])
    found = []
    for count in objects:
        corner = rng.uniform(0, 0.6, (count, 2, 1, 1)) * np.array(masks_size)[:, None, None]
        y, x = np.mgrid[: masks_size[0], : masks_size[1]]
        inside = (y >= corner[:, 0]) & (y < corner[:, 0] + 9) & (x >= corner[:, 1]) & (x < corner[:, 1] + 12)
        labels = torch.from_numpy(rng.integers(0, CLASSES, count))
        found.append(fast.matching.Objects(labels, torch.from_numpy(inside.reshape(-1, *masks_size))))
    return output, found


def leaves(output):
    """All logits of an output, in order."""
    last = {name: getattr(output, name) for name in ("class_queries_logits", "masks_queries_logits")}
    return [prediction[name] for prediction in (*output.auxiliary_logits, last) for name in last]


def fixed_rand(monkeypatch):
    """Make torch.rand give the same points to every mask, drawn from their number alone, whoever asks for them."""
    real = torch.rand

    def rand(*shape, generator=None, **options):
        table = real(shape[1], 2, generator=torch.Generator().manual_seed(shape[1]))
        return table.expand(*shape).clone()

    monkeypatch.setattr(torch, "rand", rand)
    return rand


@pytest.mark.parametrize("objects", [[3], [2, 0, 5], [9, 1]], ids=str)
def test_set_loss_is_the_references_at_the_same_points(objects, monkeypatch):
    """Layer by layer: match at common points, then losses at the points that each mask draws."""
    output, found = scene(objects)
    rand = fixed_rand(monkeypatch)
    got = fast.matching.SetLoss(POINTS)(output, found)
    common, totals = rand(1, POINTS, 2)[0].double().numpy(), np.zeros(3)
    r = reference.matching
    values = leaves(output)
    for classes, masks in zip(values[::2], values[1::2], strict=True):
        entropy = dice = cross = weight = 0.0
        for c, m, o in zip(classes.double().numpy(), masks.double().numpy(), found, strict=True):
            targets, labels = o.masks.double().numpy(), o.labels.numpy()
            costs = r.matching_costs(c, r.sample_points(m, common), labels, r.sample_points(targets, common))
            queries, chosen = r.match(costs)
            share = r.NO_OBJECT_WEIGHT * (QUERIES - len(queries)) + len(queries)  # of the batch's weighted mean
            cross, weight = cross + share * r.class_loss(c, queries, labels[chosen]), weight + share
            for query, which in zip(queries, chosen, strict=True):
                points = (
                    fast.matching.important_points(torch.from_numpy(m[[query]]).float(), POINTS)[0].double().numpy()
                )
                parts = r.mask_losses(
                    r.sample_points(m[[query]], points), r.sample_points(targets[[which]], points), max(1, sum(objects))
                )
                entropy, dice = entropy + parts[0], dice + parts[1]
        totals += [r.CLASS_WEIGHT * cross / weight, r.MASK_WEIGHT * entropy, r.DICE_WEIGHT * dice]
    for name, wanted in zip(("class", "mask", "dice", "loss"), [*totals, totals.sum()], strict=True):
        assert got[name].item() == pytest.approx(wanted, rel=2e-5), name


@pytest.fixture(scope="module")
def theirs():
    """Mask2Former's loss in transformers, a test-only dependency, with the weights of the paper."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.mask2former import modeling_mask2former as module

    config = transformers.Mask2FormerConfig(
        num_labels=CLASSES, class_weight=2.0, mask_weight=5.0, dice_weight=5.0, train_num_points=POINTS
    )
    return module.Mask2FormerLoss(config, {})


def weighted(losses):
    """Sums over the predictions of transformers' losses, weighted as ours."""
    weights = {"cross_entropy": 2.0, "mask": 5.0, "dice": 5.0}
    return [w * sum(v for k, v in losses.items() if k.startswith(f"loss_{name}")) for name, w in weights.items()]


@pytest.mark.parametrize("objects", [[3], [2, 4, 5], [9, 1], [1, 0, 2]], ids=str)
def test_set_loss_equals_that_of_transformers_at_the_same_points(objects, theirs, monkeypatch):
    output, found = scene(objects, seed=1)
    values = [value.requires_grad_() for value in leaves(output)]
    masks, labels = [o.masks.float() for o in found], [o.labels for o in found]
    fixed_rand(monkeypatch)
    wanted = weighted(
        theirs(output.masks_queries_logits, output.class_queries_logits, masks, labels, output.auxiliary_logits)
    )
    got = fast.matching.SetLoss(POINTS)(output, found)
    for name, value in zip(("class", "mask", "dice"), wanted, strict=True):
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(loss, values) for loss in (got["loss"], sum(wanted))]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_points_are_drawn_in_the_order_of_transformers(theirs):
    """One image and one prediction: the same seed alone gives the same points, and so the same loss."""
    output, (found,) = scene([4], seed=2, layers=0)
    torch.manual_seed(3)
    wanted = weighted(
        theirs(output.masks_queries_logits, output.class_queries_logits, [found.masks.float()], [found.labels])
    )
    torch.manual_seed(3)
    got = fast.matching.SetLoss(POINTS)(output, [found])
    torch.testing.assert_close([got[n] for n in ("class", "mask", "dice")], wanted, rtol=1e-5, atol=1e-6)


def test_important_points_are_where_masks_are_unsure():
    masks = torch.full((2, 8, 8), 9.0)
    masks[0, :, 3], masks[1, 2] = 0.0, 0.0
    points = fast.matching.important_points(masks, 40, torch.Generator().manual_seed(0))
    assert points.shape == (2, 40, 2) and points.min() >= 0 and points.max() <= 1
    sure = fast.matching.sample_points(masks, points).abs()
    assert sure[:, :30].max() < 9.0 and sure[:, :30].mean() < 0.6 * sure[:, 30:].mean()


@pytest.mark.parametrize("objects", [[0], [0, 0], [0, 3]], ids=str)
def test_images_without_objects_train_on(objects):
    """Mask and dice loss are 0 with a gradient of 0, so that every output stays in the graph."""
    output, found = scene(objects)
    values = [value.requires_grad_() for value in leaves(output)]
    losses = fast.matching.SetLoss(POINTS)(output, found)
    losses["loss"].backward()
    assert all(value.grad.isfinite().all() for value in values) and losses["class"] > 0
    if not sum(objects):
        assert losses["mask"] == losses["dice"] == 0 and not any(v.grad.any() for v in values[1::2])
        assert all(v.grad.any() for v in values[::2])


def test_empty_and_full_masks_and_more_objects_than_queries_train_on():
    output, found = scene([9, 2])
    found[0].masks[:3], found[0].masks[3:5] = False, True
    values = [value.requires_grad_() for value in leaves(output)]
    losses = fast.matching.SetLoss(POINTS)(output, found)
    losses["loss"].backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(value.grad.isfinite().all() and value.grad.any() for value in values)


def test_a_query_gone_wrong_is_matched_last(monkeypatch):
    """Logits of one query that are not numbers: the loss shows it, but the others keep their objects."""
    output, found = scene([3], layers=0)
    output.masks_queries_logits[0, 2] = torch.nan
    pairs, real = [], fast.matching.match
    monkeypatch.setattr(fast.matching, "match", lambda costs: pairs.append(real(costs)) or pairs[-1])
    fast.matching.SetLoss(POINTS)(output, found)
    assert len(pairs[0][0]) == 3 and 2 not in pairs[0][0].tolist()


def test_loss_is_deterministic_given_a_generator_and_in_float32_under_autocast():
    output, found = scene([3, 2])
    loss = fast.matching.SetLoss(POINTS)
    first, again, other = (loss(output, found, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert all(torch.equal(first[k], again[k]) for k in first) and first["mask"] != other["mask"]
    with torch.autocast("cpu", torch.bfloat16):
        low = loss(output, found, generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(first[k], low[k]) and low[k].dtype == torch.float32 for k in first)


def test_count_divides_the_losses_of_masks():
    """Data-parallel training passes the mean over its processes: two halves then add up to the whole."""
    output, found = scene([3, 2])
    losses = [
        fast.matching.SetLoss(POINTS)(output, found, count, torch.Generator().manual_seed(0))
        for count in (None, 5.0, 10)
    ]
    for name in ("mask", "dice"):
        assert losses[0][name] == losses[1][name]
        torch.testing.assert_close(losses[1][name], 2 * losses[2][name])
    assert losses[0]["class"] == losses[2]["class"]
    assert losses[0]["loss"].item() == pytest.approx(sum(losses[0][k].item() for k in ("class", "mask", "dice")))


@pytest.mark.parametrize("size", [(24, 36), (48, 72), (6, 9)], ids=str)
def test_masks_of_any_size_over_the_same_area_will_do(size):
    output, found = scene([3], masks_size=(24, 36))
    resized = torch.nn.functional.interpolate(found[0].masks[None].float(), size=size, mode="area")[0]
    losses = [
        fast.matching.SetLoss(400)(output, [o], generator=torch.Generator().manual_seed(0))
        for o in (found[0], fast.matching.Objects(found[0].labels, resized))
    ]
    assert losses[1]["mask"].item() == pytest.approx(losses[0]["mask"].item(), rel=0.1)
