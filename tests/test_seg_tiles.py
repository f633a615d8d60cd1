"""Tiles and views of pictures in which the right answer is known, as the model goes by colours."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from benchmarks import measure
from fast.segmenter import output
from tests.seg_train_cases import config_of
from train.common.errors import UserError
from train.config.segmentation import Evaluator
from train.data.masks import decode, encode
from train.data.normalization import MEAN, STD
from train.data.sample import ClassInfo, Vocabulary
from train.data.segmentation_transforms import EvalTransform
from train.inference import segmentation as inference
from train.inference import views as tiles
from train.inference.predictions import Instance, Panoptic, check
from train.inference.tile_grid import cut_picture, cut_side
from train.inference.tile_joining import InstanceJoiner, PanopticJoiner, put, share_of_union

KINDS = 3  # countable classes: red value modulo 3; the fourth class is what is black
VOCABULARY = Vocabulary(tuple(ClassInfo(name, i, i < KINDS, None) for i, name in enumerate("abc-")), "colours")
TASKS = ["semantic", "instance", "panoptic"]


class ByColour(nn.Module):
    """A query for each connected region of one red value, and one for black; it is sure of all it says."""

    def __init__(self):
        super().__init__()
        self.sure = nn.Parameter(torch.tensor(10.0))
        self.sizes = []

    def forward(self, images):
        """Look at the top left pixel of each cell."""
        self.sizes.append(tuple(images.shape[2:]))
        red = (255 * (images[0, 0] * STD[0] + MEAN[0])).round().int().numpy()[::4, ::4]
        masks, labels = [red == 0], [KINDS]
        for value in np.unique(red[red > 0]).tolist():
            regions, count = ndimage.label(red == value)
            masks += [regions == i for i in range(1, count + 1)]
            labels += [value % KINDS] * count
        logits = self.sure * (2 * torch.from_numpy(np.array(masks)).float() - 1)
        classes = self.sure * (2 * nn.functional.one_hot(torch.tensor(labels), KINDS + 2).float() - 1)
        return output([(classes[None], logits[None])])


def paint(size, *boxes):
    """Paint boxes (top, left, bottom, right, red value) on black."""
    result = np.zeros((*size, 3), dtype=np.uint8)
    for top, left, bottom, right, value in boxes:
        result[top:bottom, left:right, 0] = value
    return result


def see(picture, tasks=TASKS, transform=None, **rules):
    """Segment a picture by its colours."""
    evaluator, model = Evaluator(top=1000, **rules), ByColour().eval()
    views = [(transform or EvalTransform())(picture)]
    found = tiles.predict(model, views, picture.shape[:2], tasks, VOCABULARY, evaluator, nullcontext())
    for task, prediction in found.items():
        check(task, prediction, "a", picture.shape[:2], 4)
    return found, model


def objects(found):
    """List instances that the model is sure of, order aside, as what can be compared."""
    return sorted((each.label, each.rle["counts"]) for each in found if each.score > 0.5)


def segments(found):
    """List panoptic segments, order aside, as what can be compared."""
    return sorted((each.label, each.is_thing, encode(found.map == each.id)["counts"]) for each in found.segments)


def assert_same(found, whole):
    """Compare all three predictions with those of the whole picture."""
    assert np.array_equal(found["semantic"], whole["semantic"])
    assert objects(found["instance"]) == objects(whole["instance"])
    assert segments(found["panoptic"]) == segments(whole["panoptic"])


CASES = {
    "in one tile": ((128, 200), (8, 12, 30, 40, 1), (60, 150, 77, 191, 5)),
    "over a seam": ((64, 200), (8, 40, 50, 80, 1)),
    "over four tiles": ((128, 128), (40, 44, 80, 90, 2)),
    "larger than a tile": ((300, 260), (10, 10, 290, 250, 4)),
    "in all tiles": ((300, 260), (0, 0, 300, 260, 4)),
    "touching along a seam": ((64, 200), (8, 20, 60, 56, 1), (8, 56, 60, 90, 4)),
    "touching where tiles overlap": ((200, 64), (20, 8, 60, 60, 1), (60, 8, 90, 60, 4)),
    "another class over a seam": ((64, 200), (8, 40, 34, 80, 1), (34, 40, 60, 80, 2)),
    "two arms that meet in the next tile": ((64, 200), (0, 8, 16, 100, 1), (40, 8, 60, 100, 1), (0, 88, 60, 100, 1)),
    "a ring": ((200, 200), (12, 12, 188, 188, 7), (40, 40, 160, 160, 0)),
    "nothing": ((100, 100),),
    "a slender picture": ((9, 400), (2, 3, 8, 390, 1)),
}


@pytest.mark.parametrize("overlap", [8, 16, 32])
@pytest.mark.parametrize("case", CASES)
def test_tiles_give_what_the_whole_gives(case, overlap):
    picture = paint(*CASES[case])
    whole, _ = see(picture)
    found, model = see(picture, tile=64, tile_overlap=overlap)
    assert len(model.sizes) > 1 and max(map(max, model.sizes)) <= 64
    assert_same(found, whole)


@pytest.mark.parametrize("seed", range(8))
def test_tiles_give_what_the_whole_gives_at_random(seed):
    generator = np.random.default_rng(seed)
    size = generator.integers(100, 300, 2).tolist()
    boxes = []
    for value in range(1, 25):
        top, left = (int(generator.integers(side)) for side in size)
        boxes.append((top, left, top + 4 + int(generator.integers(90)), left + 4 + int(generator.integers(90)), value))
    picture = paint(size, *boxes)
    found, _ = see(picture, ["semantic"], tile=64, tile_overlap=16)
    assert np.array_equal(found["semantic"], see(picture, ["semantic"])[0]["semantic"])


@pytest.mark.parametrize("short", [64, 150])
def test_scaled_pictures_are_cut_as_the_network_sees_them(short):
    picture = paint((300, 420), (30, 100, 210, 300, 9), (0, 300, 90, 420, 3))
    transform = EvalTransform(short)
    whole, found = see(picture, transform=transform)[0], see(picture, transform=transform, tile=64)[0]
    assert (found["semantic"] == whole["semantic"]).mean() > 0.999
    assert [each.label for each in found["instance"]].count(0) == [each.label for each in whole["instance"]].count(0)
    large = max(whole["instance"], key=lambda each: decode(each.rle).sum())
    best = max(share_of_union([each.rle], [large.rle])[0, 0] for each in found["instance"])
    assert best > 0.995


@pytest.mark.parametrize("tile", [200, 4096])
def test_a_picture_within_a_tile_is_seen_whole(tile):
    picture = paint((130, 200), (40, 44, 80, 90, 2))
    (whole, one), (found, other) = see(picture), see(picture, tile=tile)
    assert_same(found, whole)
    assert one.sizes == other.sizes and found["instance"] == whole["instance"]


@pytest.mark.parametrize(("inner", "tile", "overlap"), [(1000, 64, 8), (999, 512, 64), (70, 64, 32), (513, 512, 256)])
@pytest.mark.parametrize("outer", [1000, 313, 4001])
def test_spans_overlap_and_their_cores_fill_the_side(inner, outer, tile, overlap):
    spans = cut_side(inner, outer, tile, overlap)
    assert spans[0].start == 0 and spans[-1].stop == inner
    assert all(each.start % 4 == 0 and 32 <= each.length <= tile for each in spans)
    assert all(a.stop - b.start >= overlap for a, b in zip(spans, spans[1:], strict=False))
    assert [each.core[1] for each in spans[:-1]] == [each.core[0] for each in spans[1:]]
    assert all(each.start <= each.core[0] < each.core[1] <= each.stop for each in spans)
    assert [i for each in spans for i in range(*each.own)] == list(range(outer))
    assert all(len(each.places) == each.seen[1] - each.seen[0] for each in spans)


def test_joined_objects_have_the_best_score_and_no_double():
    ((one, two),) = cut_picture((64, 120), (64, 120), 64, 8)
    assert one.outer == two.outer == (64, 62)
    left, right = np.zeros((64, 62), dtype=bool), np.zeros((64, 62), dtype=bool)
    left[10:20, 40:], right[10:20, :28] = True, True
    joiner = InstanceJoiner()
    joiner.add(one, [Instance(0, 0.6, encode(left)), Instance(0, 0.2, encode(left)), Instance(1, 0.1, encode(left))])
    joiner.add(two, [Instance(0, 0.9, encode(right)), Instance(0, 0.3, encode(~right))])
    found = joiner.result((64, 120))
    assert [(each.label, each.score) for each in found] == [(0, 0.9), (0, 0.3), (1, 0.1)]
    expected = np.zeros((64, 120), dtype=bool)
    expected[10:20, 40:86] = True
    assert np.array_equal(decode(found[0].rle), expected)
    assert InstanceJoiner().result((4, 4)) == []


def test_what_only_one_tile_has_seen_stays_in_the_map():
    ((one, two),) = cut_picture((64, 120), (64, 120), 64, 8)
    edge = np.zeros((64, 62), dtype=np.int32)
    edge[:, 60:] = 1
    joiner, blank = PanopticJoiner((64, 120)), Panoptic(np.zeros((64, 62), dtype=np.int32), [])
    segment = type("Segment", (), {"id": 1, "label": 0, "score": 0.9, "is_thing": True})
    joiner.add(one, Panoptic(edge, [segment]))
    joiner.add(two, blank)
    found = joiner.result()
    assert (found.map == 1).sum() == 128 and [each.score for each in found.segments] == [0.9]


@pytest.mark.parametrize("size", [(7, 5), (9, 11)])
def test_masks_are_put_into_pictures(size):
    generator = np.random.default_rng(0)
    for _ in range(50):
        (top, bottom), (left, right) = (np.sort(generator.choice(side + 1, 2, replace=False)) for side in size)
        mask = generator.random((bottom - top, right - left)) < 0.7
        whole = np.zeros(size, dtype=bool)
        whole[top:bottom, left:right] = mask
        assert put(mask, int(top), int(left), size) == encode(whole)


@pytest.mark.parametrize("tile", [None, 64])
def test_mirrored_views_find_the_same(tile):
    picture = paint((64, 160), (8, 12, 32, 40, 1), (20, 60, 60, 120, 5))
    config = config_of("--evaluator.flip", "true", "--evaluator.top", 50, *(["--evaluator.tile", tile] if tile else []))
    views = tiles.prepare_views(picture, config)
    assert [each.flipped for each in views] == [False, True]
    model, tasks = ByColour().eval(), ["semantic", "instance"]
    found = tiles.predict(model, views, (64, 160), tasks, VOCABULARY, config.evaluator, nullcontext())
    whole, _ = see(picture)
    assert np.array_equal(found["semantic"], whole["semantic"])
    assert len(objects(found["instance"])) == 2 and objects(found["instance"]) == objects(whole["instance"])
    with pytest.raises(UserError, match="several views .* have no panoptic mean: ask for the task semantic or"):
        tiles.predict(model, views, (64, 160), ["panoptic"], VOCABULARY, config.evaluator, nullcontext())


class BySide(nn.Module):
    """Everything is one object: of class 0 with 0.6 in wide views, of class 1 with 0.9 in narrow ones."""

    def __init__(self):
        super().__init__()
        self.none = nn.Parameter(torch.zeros(()))

    def forward(self, images):
        """Look at the width only."""
        chances = torch.tensor([0.6, 0.4, 1e-9] if images.shape[3] > 100 else [0.1, 0.9, 1e-9])
        return output(
            [(chances.log()[None, None], torch.full((1, 1, *(-(-side // 4) for side in images.shape[2:])), 9.0))]
        )


@pytest.mark.parametrize(("scales", "label"), [([1], 0), ([1, 0.5], 1), ([1, 1.25, 1.5, 2, 3, 0.5], 0)])
def test_scales_are_averaged_and_the_best_object_stays(scales, label):
    config = config_of("--evaluator.scales", scales)
    views = tiles.prepare_views(paint((64, 128)), config)
    assert [each.size[1] for each in views] == [round(128 * scale) for scale in scales]
    words = Vocabulary(VOCABULARY.classes[:2], "two")
    found = tiles.predict(BySide(), views, (64, 128), ["semantic", "instance"], words, config.evaluator, nullcontext())
    assert (found["semantic"] == label).all()
    best = {each.label: each.score for each in found["instance"]}
    assert len(found["instance"]) == 2 and best[1] == pytest.approx(0.9 if 0.5 in scales else 0.4, abs=1e-3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--evaluator.tile", 512, "--evaluator.tile_overlap", 512], "at most half of evaluator.tile .256., not 512"),
        (
            ["--evaluator.tile", 512, "--evaluator.tile_overlap", 0],
            "evaluator.tile_overlap: .* greater than or equal to 8",
        ),
        (["--evaluator.tile_overlap", 64], "evaluator.tile_overlap needs evaluator.tile"),
        (["--evaluator.tile", 8], "evaluator.tile: .* greater than or equal to 64"),
        (["--evaluator.scales", "[]"], "evaluator.scales: .* at least 1 item"),
        (["--evaluator.scales", "[0]"], "evaluator.scales.0: .* greater than 0"),
    ],
)
def test_tiles_that_cannot_be_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        config_of(*overrides)


class Many(nn.Module):
    """Twenty queries of 600 classes, from nothing."""

    def __init__(self):
        super().__init__()
        self.none = nn.Parameter(torch.zeros(()))

    def forward(self, images):
        """Look at the size only."""
        generator = torch.Generator().manual_seed(0)
        shape = (1, 20, *(-(-side // 4) for side in images.shape[2:]))
        return output([(torch.randn(1, 20, 601, generator=generator), torch.randn(shape, generator=generator))])


def peak_of(height):
    """Return the mebibytes that a picture's semantic map in tiles adds to a process's peak."""
    words = Vocabulary(tuple(ClassInfo(str(i), i, False, None) for i in range(600)), "many")
    evaluator = Evaluator(tile=128)

    def run(rows):
        views = [EvalTransform()(np.zeros((rows, 512, 3), dtype=np.uint8))]
        tiles.predict(Many(), views, (rows, 512), ["semantic"], words, evaluator, nullcontext())

    run(300)  # what torch loads at first does not count
    before = measure.resident_peak()
    run(height)
    return measure.resident_peak() - before


def test_memory_is_bounded_by_the_picture_and_the_tile():
    """All classes' scores of the picture would have 2400 MiB, its masks' logits at full size 80."""
    assert measure.in_own_process(peak_of, 2048) < 150


def test_large_pictures_are_refused_whole_and_taken_in_tiles(monkeypatch):
    monkeypatch.setattr(inference, "MOST_INPUT", 64 * 64)
    picture = paint((128, 128), (40, 44, 80, 90, 2))
    with pytest.raises(UserError, match="pass --evaluator.tile 1024 to cut pictures into tiles"):
        see(picture)
    assert len(see(picture, tile=64)[0]["panoptic"].segments) == 2


@pytest.mark.parametrize("short", [None, 100])
def test_scores_are_means_and_no_sums_where_tiles_overlap(short):
    views, words = [EvalTransform(short)(paint((150, 170)))], Vocabulary(VOCABULARY.classes[:2], "two")
    look = tiles.View(BySide(), views[0], (150, 170), ["semantic"], words, Evaluator(tile=64), nullcontext())
    with torch.inference_mode():
        scores = torch.cat([look.scores(first, first + 10) for first in range(0, 150, 10)], dim=1)
    expected = torch.tensor([0.1, 0.9])[:, None, None].expand(2, 150, 170) * torch.tensor(9.0).sigmoid()
    assert torch.allclose(scores, expected, atol=1e-5)
