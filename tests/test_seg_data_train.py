"""What training makes of a sample: fixed sizes, masks that stay on their objects, batches that can be made again."""

import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from fast.matching import Objects
from tests import seg_trees as trees
from tests.seg_trees import bands
from train.common.errors import UserError
from train.data import classification_dataset, segmentation_dataset
from train.data.classification_dataset import isolated_random
from train.data.formats import open_source
from train.data.loader import BadImages
from train.data.normalization import MEAN, STD
from train.data.sample import Sample
from train.data.segmentation_dataset import SegmentationDataset, collate
from train.data.segmentation_transforms import (
    EvalTransform,
    LargeJitter,
    Prepared,
    ShortSide,
    TrainTransform,
    draw_window,
    largest_share,
    unscaled,
)

# Loader processes are forked from a process that has threads; Python 3.12 warns of that, as torch's default does it.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")


def sample_of(masks, labels=None, crowd=None):
    """Make a sample whose picture is white where any mask is and black elsewhere."""
    masks = np.asarray(masks, dtype=bool)
    image = np.repeat(masks.any(axis=0)[..., None] * np.uint8(255), 3, axis=2)
    labels = np.arange(len(masks)) if labels is None else np.array(labels)
    crowd = np.zeros(len(masks), dtype=bool) if crowd is None else np.array(crowd)
    return Sample(image, masks, labels, crowd, np.zeros(masks.shape[1:], dtype=bool), "a")


def coloured():
    """Make a sample of random colours with two masks."""
    sample = sample_of([disc(128, 128, 40, 50, 30), disc(128, 128, 90, 90, 20)])
    return replace(sample, image=trees.picture(1, (128, 128)))


def disc(height, width, y, x, radius):
    """Make a mask (height, width) of a disc."""
    rows, columns = np.ogrid[:height, :width]
    return (rows + 0.5 - y) ** 2 + (columns + 0.5 - x) ** 2 < radius**2


def brightness(image):
    """Undo the normalisation, (3, h, w) -> (h, w) from 0 to 1."""
    return (image * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]).mean(dim=0)


def centre(weights):
    """Return the centre of mass (y, x) of (h, w), pixels."""
    weights = weights.double()
    places = [torch.arange(side).double() + 0.5 for side in weights.shape]
    return [float((weights.sum(dim=1 - axis) * place).sum() / weights.sum()) for axis, place in enumerate(places)]


@pytest.mark.parametrize("resize", [ShortSide(64), LargeJitter((96, 128)), unscaled])
def test_masks_stay_on_their_objects(resize):
    """Nearest pixels of masks that torch's older rule picks would be up to half a pixel off."""
    transform = TrainTransform(resize, (300, 400))
    for seed in range(12):
        with isolated_random(seed):
            image, objects = transform(sample_of([disc(120, 160, 50, 60, 40)]))
        bright = brightness(image) * (image != 0).any(dim=0)  # padding is exactly 0
        assert image.shape == (3, 300, 400) and objects.masks.shape == (1, 300, 400)
        assert centre(objects.masks[0]) == pytest.approx(centre(bright), abs=0.25)


@pytest.mark.parametrize("size", [(50, 80), (100, 160), (170, 272), (24, 39)])
def test_windows_have_the_scale_asked_for_and_reach_every_edge(size):
    random.seed(0)
    windows = np.array([draw_window((100, 160), size, (40, 60)) for _ in range(300)])
    shown = np.minimum(size, (40, 60)) * np.array([100, 160]) / size
    assert (np.abs(windows[:, 2:] - shown) <= 1).all() and (windows[:, :2] >= 0).all()
    ends = windows[:, :2] + windows[:, 2:]
    assert (windows[:, :2].min(axis=0) == 0).all() and (ends.max(axis=0) == (100, 160)).all()


def test_crop_shows_a_part_and_drops_what_it_does_not_show():
    masks = [disc(200, 200, 30, 30, 9), disc(200, 200, 170, 170, 9)]
    transform, counts = TrainTransform(unscaled, (64, 64), flip=0), set()
    for seed in range(30):
        with isolated_random(seed):
            image, objects = transform(sample_of(masks, [4, 7]))
        counts.add(tuple(objects.labels.tolist()))
        assert torch.equal((brightness(image) > 0.5), objects.masks.any(dim=0))
    assert counts == {(), (4,), (7,)}


def test_crowds_and_empty_masks_are_not_trained_on():
    full, none = np.ones((40, 40), dtype=bool), np.zeros((40, 40), dtype=bool)
    transform = TrainTransform(unscaled, (64, 64))
    _, objects = transform(sample_of([full, none, full], [3, 4, 5], [False, False, True]))
    assert objects.labels.tolist() == [3] and objects.masks[0].sum() == 1600
    image, objects = transform(sample_of(np.zeros((0, 40, 40))))
    assert objects.masks.shape == (0, 64, 64) and objects.labels.dtype == torch.int64 and image.isfinite().all()


def test_padding_is_mean_colour_at_right_and_bottom_and_in_no_mask():
    image, objects = TrainTransform(unscaled, (64, 80))(sample_of(np.ones((1, 40, 60))))
    assert (image[:, :40, :60] != 0).all() and not image[:, 40:].any() and not image[:, :, 60:].any()
    assert objects.masks[0, :40, :60].all() and objects.masks.sum() == 2400


def test_scales_are_the_published_ones():
    random.seed(0)
    sizes = {ShortSide(512, longest=4096)(500, 1000) for _ in range(400)}
    assert {size[0] for size in sizes} == {round(51.2 * tenth) for tenth in range(5, 21)}
    assert max(ShortSide(512)(100, 1000) for _ in range(50))[1] == 2048
    sizes = [LargeJitter((1024, 1024))(480, 640) for _ in range(400)]
    assert 102 <= min(width for _, width in sizes) < 130 and 2000 < max(width for _, width in sizes) <= 2048
    assert all(abs(height - 0.75 * width) <= 1 for height, width in sizes)


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (1, 1)])
@pytest.mark.parametrize("resize", [ShortSide(512), LargeJitter((512, 512))])
def test_slender_pictures_cost_no_more_than_others(shape, resize):
    start = time.perf_counter()
    image, objects = TrainTransform(resize, (512, 512), 0.75, True)(sample_of(np.ones((1, *shape))))
    assert image.shape == (3, 512, 512) and objects.masks.any() and image.isfinite().all()
    prepared = EvalTransform(512, 2048)(np.zeros((*shape, 3), dtype=np.uint8))
    assert min(prepared.image.shape[1:]) >= 32 and max(prepared.image.shape) <= 2048
    assert time.perf_counter() - start < 5


def test_no_class_takes_more_than_its_share_of_a_crop_if_it_can_be_helped():
    halves = np.stack([bands(1, 0) > 0, bands(0, 1) > 0])
    shares = []
    for seed in range(40):
        transform = TrainTransform(unscaled, (16, 16), most_of_one=0.75)
        with isolated_random(seed):
            shares.append(largest_share(sample_of(halves), transform.choose_window(sample_of(halves), (40, 60))))
    assert np.mean(np.array(shares) < 0.75) > 0.8
    assert transform.choose_window(sample_of(halves[:1]), (40, 60))[2:] == (16, 16)


def test_jitter_changes_colours_only():
    sample = coloured()
    plain, jittered = (TrainTransform(unscaled, (128, 128), jitter=jitter, flip=0) for jitter in (False, True))
    original, objects = plain(sample)
    images = []
    for seed in range(8):
        with isolated_random(seed):
            image, changed = jittered(sample)
        assert torch.equal(changed.masks, objects.masks) and image.isfinite().all()
        images.append(image)
    assert sum(not torch.equal(image, original) for image in images) >= 6
    assert len({float(image.sum()) for image in images}) >= 6


def test_flip_turns_picture_and_masks():
    sample = coloured()
    (image, objects), (turned, mirrored) = (TrainTransform(unscaled, (128, 128), flip=p)(sample) for p in (0, 1))
    assert torch.equal(turned, image.flip(2)) and torch.equal(mirrored.masks, objects.masks.flip(2))


def samples_of(source, on_bad_image="skip"):
    return SegmentationDataset(source, TrainTransform(ShortSide(32), (32, 32), 0.75, True), 5, on_bad_image)


def test_randomness_is_of_seed_epoch_and_index_alone(tmp_path):
    samples = samples_of(open_source(trees.ade20k(tmp_path, [bands(1, 2), bands(3, 4)]), "train"))
    state, first = torch.get_rng_state(), samples[1, 0]
    assert torch.equal(torch.get_rng_state(), state)
    samples[0, 1], torch.rand(5), random.random()
    again = samples[1, 0]
    assert torch.equal(first.image, again.image) and torch.equal(first.objects.masks, again.objects.masks)
    assert not torch.equal(first.image, samples[2, 0].image)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_skip_bad_pictures_and_name_them(tmp_path, workers):
    source = open_source(trees.ade20k(tmp_path, [bands(1, 2), bands(151), bands(0), bands(4)]), "train")
    samples = samples_of(source)
    loader = DataLoader(samples, batch_sampler=[[(0, 0), (0, 1)], [(0, 2), (0, 3)]], collate_fn=collate)
    loader = (
        loader
        if not workers
        else DataLoader(samples, batch_sampler=loader.batch_sampler, collate_fn=collate, num_workers=workers)
    )
    first, second = loader
    assert first.images.shape == (2, 3, 32, 32) and first.images.dtype == torch.float32
    assert first.asked == [0, 1] and first.used == [0, 2]
    assert [type(each) for each in first.objects] == [Objects] * 2 and len(first.objects[1].labels) == 0
    assert second.objects[1].masks.dtype == torch.bool and second.objects[1].labels.tolist() == [3]
    lines = BadImages(samples).note(first)
    (line,) = lines
    assert line.startswith("skipped unreadable image (1 so far): ") and "ADE_training_00000001.png" in line, line


def test_a_bad_picture_can_stop_the_run(tmp_path):
    samples = samples_of(open_source(trees.ade20k(tmp_path, [bands(151), bands(1)]), "train"), "stop")
    batch = collate([samples[0, 0], samples[0, 1]])
    assert batch.images is None and batch.used == [0, 1]
    with pytest.raises(UserError, match="ids outside the 150 classes"):
        samples.read(0)


def test_pictures_for_testing_keep_their_shape():
    picture = trees.picture(0, (100, 150))
    prepared = EvalTransform(50, 200)(picture)
    assert prepared.size == (50, 75) and prepared.image.shape == (3, 50, 75)
    assert EvalTransform(100, 120)(picture).size == (80, 120)
    whole = EvalTransform()(picture[:20])
    assert whole.size == (20, 150) and whole.image.shape == (3, 32, 150) and not whole.image[:, 20:].any()
    expected = (picture[:20] / 255 - np.array(MEAN)) / np.array(STD)
    assert np.allclose(whole.image[:, :20], expected.transpose(2, 0, 1), atol=1e-5)


@pytest.mark.parametrize("kind", ["classifier", "segmenter", "evaluation"])
def test_batches_are_pinned_by_their_own_method(monkeypatch, kind):
    """What DataLoader(pin_memory=True) calls, also for a batch that is to stop the run."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *rest: pinned.append(tensor.shape) or tensor)
    image, objects = torch.zeros(2, 3, 4, 4), Objects(torch.zeros(5, dtype=torch.int64), torch.zeros(5, 4, 4) > 0)
    batches = {
        "classifier": classification_dataset.Batch(image, torch.zeros(2), [0, 1], [0, 1]),
        "segmenter": segmentation_dataset.Batch(image, [objects, objects], [0, 1], [0, 1]),
        "evaluation": segmentation_dataset.EvalBatch(Prepared(image[0], (4, 4), False), None, [0], [0]),
    }
    assert type(pin_memory(batches[kind])) is type(batches[kind])
    assert len(pinned) == {"classifier": 2, "segmenter": 5, "evaluation": 1}[kind]
    pin_memory(replace(batches[kind], images=None))
