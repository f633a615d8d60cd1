"""Semantic, instance and panoptic results: equal in both twins, and to transformers' where masks are clear."""

import numpy as np
import pytest
import torch

import fast.postprocess
import reference.postprocess
from fast.segmenter import SegmenterOutput
from parity_tests.compare import assert_equal, assert_parity

CASES = {  # queries, classes, maps (h, w)
    "usual": (12, 5, (9, 14)),
    "one_query": (1, 3, (4, 4)),
    "one_pixel": (5, 2, (1, 1)),
    "one_class": (4, 1, (7, 3)),
    "many_queries": (150, 4, (3, 5)),
}
THINGS = {0, 2, 3}


def logits(name, dtype=torch.float64, sharp=3.0):
    """Class logits (q, classes + 1) and mask logits (q, h, w), rounded to tenths, so that there are ties."""
    queries, classes, size = CASES[name]
    rng = np.random.default_rng(queries)
    draws = rng.standard_normal((queries, classes + 1)), rng.standard_normal((queries, *size))
    return tuple(torch.from_numpy(np.round(sharp * x, 1)).to(dtype) for x in draws)


def exact(values):
    return tuple(x.double().numpy() for x in values)


@pytest.mark.parametrize("size", [(9, 14), (20, 33), (1, 1), (5, 40), (36, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_resize_bilinear_agrees(size, dtype, device):
    _, maps = logits("usual", dtype)
    got = fast.postprocess.resize_bilinear(maps.to(device), size)
    oracle = reference.postprocess.resize_bilinear(maps.double().numpy(), size)
    baseline = torch.from_numpy(reference.postprocess.resize_bilinear(maps.numpy(), size))
    assert_parity(got, oracle, baseline, dtype, name="resize_bilinear")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_semantic_agrees(name, dtype, device):
    given = logits(name, dtype)
    got = fast.postprocess.semantic(*(x.to(device) for x in given))
    oracle = reference.postprocess.semantic(*exact(given))
    baseline = torch.einsum("qc,qhw->chw", given[0].softmax(dim=1)[:, :-1], given[1].sigmoid())
    assert_parity(got, oracle, baseline, dtype, name="semantic")


@pytest.mark.parametrize("top", [1, 7, 100])
@pytest.mark.parametrize("name", CASES)
def test_instances_agree(name, top, device):
    """Equal scores come in the order of the query, then of the class: twin queries, twin classes."""
    classes, masks = logits(name)
    if len(classes) > 3:
        classes[3], classes[:, 0] = classes[1], classes[:, -2]
    got = fast.postprocess.instances(classes.to(device), masks.to(device), top)
    scores, labels, found = reference.postprocess.instances(*exact((classes, masks)), top)
    assert len(scores) == min(top, classes.shape[0] * (classes.shape[1] - 1))
    assert_parity(got[0], scores, torch.from_numpy(scores), torch.float64, name="instances: scores")
    assert_equal(got[1], labels, name="instances: labels")
    assert_equal(got[2], found, name="instances: masks")


@pytest.mark.parametrize("thresholds", [(0.8, 0.8), (0.3, 0.1), (0.0, 0.0), (1.0, 0.8), (0.3, 1.0)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_panoptic_agrees(name, thresholds, device):
    given = logits(name)
    got, segments = fast.postprocess.panoptic(*(x.to(device) for x in given), THINGS, *thresholds)
    expected, wanted = reference.postprocess.panoptic(*exact(given), THINGS, *thresholds)
    assert_equal(got, expected, name="panoptic: map")
    assert [(s.id, s.label, s.is_thing) for s in segments] == [(s.id, s.label, s.is_thing) for s in wanted]
    np.testing.assert_allclose([s.score for s in segments], [s.score for s in wanted], rtol=1e-12)
    assert set(got.unique().tolist()) - {0} == {s.id for s in segments}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_of_low_precision_are_read_in_float32(dtype):
    """As autocast leaves them: 16-bit sums over an image would round scores to a hundredth or overflow."""
    low = logits("usual", dtype)
    wide = tuple(x.float() for x in low)
    for function, rest in (("semantic", ()), ("instances", (9,)), ("panoptic", (THINGS, 0.3, 0.1))):
        results = [getattr(fast.postprocess, function)(*given, *rest) for given in (low, wide)]
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype if torch.is_tensor(a) else a == b
    resized_maps = [fast.postprocess.resize_bilinear(given[1], (20, 21)) for given in (low, wide)]
    assert torch.equal(*resized_maps) and resized_maps[0].dtype == torch.float32


TWINS = {"reference": reference.postprocess, "fast": fast.postprocess}


def call(twin, function, *arguments, **options):
    arguments = [torch.tensor(a) if twin == "fast" and isinstance(a, np.ndarray) else a for a in arguments]
    return getattr(TWINS[twin], function)(*arguments, **options)


@pytest.mark.parametrize("twin", TWINS)
def test_panoptic_by_hand(twin):
    """A thing hides most of another, two pieces of one stuff class become one segment, the unsure query is dropped."""
    rows = np.array([[9, 9, 9, -9, -9, -9, -9, -9], [8, 8, 8, 8, -9, -9, -9, -9], [-9, -9, -9, -9, 9, -9, -9, -9]])
    rows = np.concatenate([rows, [[-9, -9, -9, -9, -9, 9, 9, -9], [9] * 8]]).astype(float)
    labels = [0, 0, 1, 1, 2]
    classes = np.where(np.arange(4) == np.array(labels)[:, None], 9.0, 0.0)
    classes[4, 2] = 1.0  # less than 0.8 sure
    found, segments = call(twin, "panoptic", classes, rows[:, None], {0})
    assert found.tolist() == [[1, 1, 1, 0, 2, 2, 2, 0]]
    assert [(s.id, s.label, s.is_thing) for s in segments] == [(1, 0, True), (2, 1, False)]


@pytest.mark.parametrize("twin", TWINS)
def test_what_a_query_owns_counts_for_the_share_left_and_thresholds_are_strict(twin):
    """As in Mask2Former's own code: the second mask of four pixels keeps two, yet owns three faint ones beside them."""
    masks = np.array([[[9.0, 9, 9, -9, -9, -9, -9, -9]], [[-9.0, 8, 8, 8, 8, -1, -1, -1]]])
    classes = np.array([[9.0, 0, 0], [0, 9.0, 0]])
    found, segments = call(twin, "panoptic", classes, masks, {0, 1})
    assert found.tolist() == [[1, 1, 1, 2, 2, 0, 0, 0]] and [s.label for s in segments] == [0, 1]
    half = np.zeros((2, 2))  # class and "no object" equally likely
    found, segments = call(twin, "panoptic", half, masks, {0}, object_threshold=0.5)
    assert not found.any() and segments == []
    assert len(call(twin, "panoptic", half, masks, {0}, object_threshold=0.49)[1]) == 2


@pytest.mark.parametrize("twin", TWINS)
def test_nothing_to_see_gives_an_empty_map(twin):
    classes, masks = np.zeros((4, 3)), np.full((4, 5, 6), -9.0)
    classes[:, -1] = 20  # "no object"
    found, segments = call(twin, "panoptic", classes, masks, {0})
    assert not found.any() and tuple(found.shape) == (5, 6) and segments == []
    sure = np.where(np.arange(3) == 0, 20.0, np.zeros((4, 3)))
    found, segments = call(twin, "panoptic", sure, masks, {0})  # sure of the class, but no pixel is in any mask
    assert not found.any() and segments == []
    scores, _, found = call(twin, "instances", sure, masks)
    assert not found.any() and not scores.any()


@pytest.fixture(scope="module")
def processor():
    """The post-processing of transformers, a test-only dependency."""
    return pytest.importorskip("transformers").Mask2FormerImageProcessor()


def scene(batch=2):
    """A SegmenterOutput with discs of sure classes over a sure background, so that masks are clear and nearly whole."""
    y, x = np.mgrid[:24, :32]
    rng, classes, masks = np.random.default_rng(4), [], []
    for _ in range(batch):
        centres = np.stack([rng.uniform(3, 29, 9), rng.uniform(3, 21, 9)], axis=1)
        discs = np.stack([np.hypot(x - cx, y - cy) < 4 for cx, cy in centres])
        hidden = np.cumsum(discs, axis=0) - discs > 0
        discs &= ~hidden
        masks.append(np.concatenate([discs, ~discs.any(axis=0)[None]]))
        labels = np.append(rng.integers(0, 4, 9), 4)
        classes.append(np.where(np.arange(6) == labels[:, None], 12 + rng.random((10, 6)), rng.random((10, 6))))
    masks = 40.0 * np.stack(masks) - 20.0
    return SegmenterOutput(torch.tensor(np.stack(classes)).float(), torch.tensor(masks).float(), [])


def resized(output, i):
    """Logits of image ``i``, masks at the size that transformers works in."""
    return output.class_queries_logits[i], fast.postprocess.resize_bilinear(output.masks_queries_logits[i], (384, 384))


def test_semantic_equals_that_of_transformers(processor):
    output = scene()
    maps = processor.post_process_semantic_segmentation(output)
    sized = processor.post_process_semantic_segmentation(output, target_sizes=[(50, 70), (31, 20)])
    for i, size in enumerate([(50, 70), (31, 20)]):
        votes = fast.postprocess.semantic(*resized(output, i))
        assert torch.equal(maps[i], votes.argmax(dim=0))
        assert torch.equal(sized[i], fast.postprocess.resize_bilinear(votes, size).argmax(dim=0))


def test_instances_equal_those_of_transformers(processor):
    """It keeps as many pairs as there are queries, drops scores below the threshold, and rounds to six digits."""
    output = scene()
    results = processor.post_process_instance_segmentation(output, threshold=0.5, return_binary_maps=True)
    for i, result in enumerate(results):
        found = fast.postprocess.instances(*resized(output, i), top=10)
        ours = {(c.item(), m.numpy().tobytes()): s.item() for s, c, m in zip(*found, strict=True) if s >= 0.5}
        info = zip(result["segments_info"], result["segmentation"], strict=True)
        theirs = {(s["label_id"], m.bool().numpy().tobytes()): s["score"] for s, m in info}
        assert len(ours) >= 8 and ours == pytest.approx(theirs, abs=2e-6)


def test_panoptic_equals_that_of_transformers(processor):
    """Where masks are clear. Ours follows Mask2Former's own code in three things in which transformers does not:

    the share that is left of a mask is measured on the mask, not on the mask times its score; a pixel outside a
    segment's mask stays empty even where that query has the highest score; pieces of one stuff class are listed once.
    """
    output, things = scene(), {0, 1, 2, 3}
    results = processor.post_process_panoptic_segmentation(
        output, threshold=0.8, overlap_mask_area_threshold=0.8, label_ids_to_fuse={4}
    )
    for i, result in enumerate(results):
        classes, masks = resized(output, i)
        found, segments = fast.postprocess.panoptic(classes, masks, things)
        clear = (masks > 1).any(dim=0)
        assert len(segments) >= 5 and clear.float().mean() > 0.9
        assert torch.equal(found[clear], result["segmentation"][clear].long())
        ours = [(s.id, s.label, s.is_thing, round(s.score, 6)) for s in segments]
        assert ours == [(s["id"], s["label_id"], not s["was_fused"], s["score"]) for s in result["segments_info"]]
        assert not found[(masks < 0).all(dim=0)].any()
