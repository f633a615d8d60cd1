"""Scattered Digits: the same everywhere, splits apart, masks exact, labels balanced, bad settings named."""

import dataclasses
import pickle
import zlib

import numpy as np
import pytest
from torch.utils.data import DataLoader

from train.data.digit_parts import BACKGROUNDS, PHOTOGRAPHS, kinds_of, load_material, read_photograph
from train.data.digits import CLASSES, LEVELS, DigitsConfig, Painter, ScatteredDigits

TEXTURES = BACKGROUNDS["textures"]
MANY = DigitsConfig(height=96, width=128, digits=(5, 12), digit_size=(16, 48), sign="either", colour=0.2)


@pytest.fixture(scope="module")
def material():
    return {split: load_material(split) for split in ("train", "val")}


@pytest.fixture(scope="module")
def hard():
    return ScatteredDigits(LEVELS["hard"], "train", 100, seed=3, transform=np.array)


def scenes(config, material, count=30, split="train"):
    painter = Painter(config, material[split])
    return [painter.render(np.random.default_rng((7, index))) for index in range(count)]


def test_item_depends_on_its_index_alone(hard):
    again = ScatteredDigits(LEVELS["hard"], "train", 10, seed=3, transform=np.array)
    for index in (9, 0, 4):
        assert np.array_equal(again[index][0], hard[index][0])
    assert not np.array_equal(hard[0][0], hard[10][0])


def test_seed_and_split_change_the_picture(hard):
    for split, seed in (("train", 4), ("val", 3)):
        assert not np.array_equal(ScatteredDigits(LEVELS["hard"], split, 1, seed=seed).scene(0).image, hard[0][0])


def test_workers_change_nothing(hard):
    batches = [list(DataLoader(hard, batch_size=16, num_workers=workers)) for workers in (0, 2)]
    for (images, labels), (images_2, labels_2) in zip(*batches, strict=True):
        assert images.equal(images_2) and labels.equal(labels_2)


def test_survives_pickling(hard):
    assert np.array_equal(pickle.loads(pickle.dumps(hard))[5][0], hard[5][0])


def test_pictures_are_the_same_on_every_machine():
    flat = DigitsConfig(background=0, contrast=(0.5, 0.7), digit_size=(24, 40), noise=0.02)
    data = ScatteredDigits(flat, "train", 20, seed=0)
    assert zlib.crc32(b"".join(data.scene(index).image.tobytes() for index in range(20))) == 2363747353


def test_splits_share_no_digit(material):
    train, val = ({glyph.tobytes() for glyph in material[split].glyphs} for split in ("train", "val"))
    assert len(train) + len(val) == 1797 and not train & val


def test_splits_share_no_pixel_of_a_photograph(material):
    textures = {split: load_material(split, "textures") for split in material}
    for chosen, name in [(material, name) for name in BACKGROUNDS["scenes"]] + [(textures, name) for name in TEXTURES]:
        parts = [chosen[split].photographs[name] for split in ("train", "val")]
        assert all(part.shape[1] > 100 for part in parts)
        assert np.array_equal(np.concatenate(parts, axis=1), read_photograph(name))


def test_backgrounds_come_from_the_own_part(material):
    bare = DigitsConfig(digits=(0, 0), background=1, sign="either", noise=0)
    for split in material:
        numbered = dataclasses.replace(material[split], photographs={"moon": np.full((300, 200, 3), 9, np.uint8)})
        assert all((scene.image == 9).all() for scene in scenes(bare, {split: numbered}, 3, split))


def test_every_kind_and_photograph_appears(material):
    seen = {(scene.background, scene.kind) for scene in scenes(LEVELS["easy"], material, 200)}
    assert seen == {(name, PHOTOGRAPHS[name]) for name in BACKGROUNDS["scenes"]}
    assert {kind for _, kind in seen} == set(kinds_of("scenes")) and len(seen) == 12


def test_textures_are_six_of_a_kind_each():
    data = ScatteredDigits(DigitsConfig(backgrounds="textures"), "val", 100)
    seen = {(scene.background, scene.kind) for scene in map(data.scene, range(100))}
    assert {name for name, _ in seen} == set(TEXTURES) and len({kind for _, kind in seen}) == len(TEXTURES) == 6


def test_retina_is_cut_inside_its_disc():
    eye = read_photograph("retina")
    assert eye.shape == (970, 970, 3) and eye.max(axis=2).min() > 60  # its surroundings are black


@pytest.mark.parametrize("level", LEVELS)
def test_picture_differs_from_its_background_only_in_the_masks(material, level):
    config = dataclasses.replace(LEVELS[level], digits=(4, 4), noise=0)
    bare = dataclasses.replace(config, digits=(0, 0))
    for scene, plain in zip(scenes(config, material), scenes(bare, material), strict=True):
        inked = np.logical_or.reduce([digit.mask for digit in scene.digits])
        changed = (scene.image != plain.image).any(axis=2)
        assert not (changed & ~inked).any()
        assert changed.sum() > 0.95 * inked.sum()  # ink may chance upon the photograph's own grey


def test_flat_background_shows_the_mask_exactly(material):
    for scene in scenes(LEVELS["flat"], material):
        grey = scene.image[~scene.digits[0].mask]
        assert (grey == grey[0]).all() and ((scene.image != grey[0]).all(axis=2) == scene.digits[0].mask).all()


def test_box_is_the_bounding_box_of_the_mask(material):
    for digit in (digit for scene in scenes(MANY, material) for digit in scene.digits):
        x0, y0, x1, y1 = digit.box
        outside = digit.mask.copy()
        outside[y0:y1, x0:x1] = False
        inside = digit.mask[y0:y1, x0:x1]
        assert not outside.any()
        assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()


def test_masks_are_disjoint_and_boxes_within_the_digit_size(material):
    for scene in scenes(MANY, material):
        assert np.sum([digit.mask for digit in scene.digits], axis=0).max() == 1
        for x0, y0, x1, y1 in (digit.box for digit in scene.digits):
            assert max(x1 - x0, y1 - y0) <= MANY.digit_size[1]


def test_no_digit_is_hidden_beyond_the_limit(material):
    """The first digit keeps its share of the ink it has when painted alone."""
    crowded = dataclasses.replace(MANY, digits=(12, 12), max_overlap=0.25)
    alone = dataclasses.replace(crowded, digits=(1, 1))
    pairs = zip(scenes(crowded, material, 60), scenes(alone, material, 60), strict=True)
    shares = [seen.digits[0].mask.sum() / full.digits[0].mask.sum() for seen, full in pairs]
    assert 0.75 <= min(shares) < 0.9 and max(shares) == 1


@pytest.mark.parametrize(("sign", "direction"), [("light", 1), ("dark", -1)])
def test_ink_keeps_its_sign_and_contrast(material, sign, direction):
    config = DigitsConfig(sign=sign, background=0.3, contrast=(0.4, 0.4), noise=0, digit_size=(48, 48))
    bare = dataclasses.replace(config, digits=(0, 0))
    for scene, plain in zip(scenes(config, material), scenes(bare, material), strict=True):
        mask = scene.digits[0].mask
        step = direction * (scene.image[mask].mean() - plain.image[mask].mean())
        assert 0.3 * 255 < step < 0.45 * 255  # 0.4, less what the anti-aliased rims lose


def test_smallest_digits_leave_the_paper_bare(material):
    """At a side of 8 pixels the corners of nearly every scan are empty, and so are those of the mask."""
    config = DigitsConfig(digit_size=(8, 8), background=0, noise=0)
    boxes = [scene.digits[0].mask for scene in scenes(config, material, 60)]
    assert np.mean([mask.sum() for mask in boxes]) < 0.6 * 64


def test_blur_leaves_no_texture_and_keeps_the_digits(material):
    sharp = DigitsConfig(height=96, width=96, background=1, noise=0, digits=(2, 2), sign="either")
    blurred = dataclasses.replace(sharp, blur=16)
    bare = dataclasses.replace(blurred, digits=(0, 0))
    for scene, same in zip(scenes(blurred, material, 20), scenes(sharp, material, 20), strict=True):
        assert all((a.mask == b.mask).all() for a, b in zip(scene.digits, same.digits, strict=True))
    steps = [
        [np.abs(np.diff(scene.image.astype(int), axis=0)).mean() for scene in scenes(config, material, 20)]
        for config in (bare, dataclasses.replace(sharp, digits=(0, 0)))
    ]
    assert np.max(steps[0]) < 2 and np.mean(steps[1]) > 4


@pytest.mark.parametrize("grey", [10, 245])
def test_either_sign_takes_the_side_with_room(material, grey):
    config = DigitsConfig(sign="either", background=1, contrast=(0.4, 0.4), noise=0)
    flat = dataclasses.replace(material["train"], photographs={"moon": np.full((99, 99, 3), grey, np.uint8)})
    for scene in scenes(config, {"train": flat}, 10):
        assert np.abs(scene.image.astype(int) - grey).max() == round(0.4 * 255)


def test_noise_does_not_wrap_around(material):
    config = DigitsConfig(digits=(0, 0), background=1, sign="either", noise=0.1)
    for noisy, clean in zip(
        scenes(config, material), scenes(dataclasses.replace(config, noise=0), material), strict=True
    ):
        assert np.abs(noisy.image.astype(int) - clean.image).max() <= round(25.5)


def test_labels_are_balanced_and_true_to_the_glyph(hard):
    labels = [hard[index][1] for index in range(100)]
    assert np.bincount(labels).tolist() == [10] * 10
    assert labels == [hard.scene(index).digits[0].label for index in range(100)]
    assert hard.classes == list(CLASSES)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 200), (300, 40), (640, 640)])
def test_any_picture_size(material, height, width):
    config = DigitsConfig(height=height, width=width, digit_size=(12, 16))
    for split in material:
        scene = scenes(config, material, 2, split)[0]
        assert scene.image.shape == (height, width, 3) and scene.image.dtype == np.uint8


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"height": 8}, "height must be a whole number from 16"),
        ({"width": 64.5}, "width must be a whole number"),
        ({"digits": (3, 2)}, "digits must name the smallest first"),
        ({"digits": 3}, "digits must be two numbers"),
        ({"digit_size": (24, 80)}, "digit_size must be a whole number from 8 to 64"),
        ({"contrast": (0, 0.5)}, "contrast must be a number from 0.05"),
        ({"background": float("nan")}, "background must be a number from 0 to 1"),
        ({"noise": "0.1"}, "noise must be a number"),
        ({"max_overlap": 1}, "max_overlap must be a number from 0 to 0.9"),
        ({"sign": "bright"}, "sign must be light, dark or either"),
        ({"blur": -1}, "blur must be a whole number from 0"),
        ({"backgrounds": "maps"}, "backgrounds must be scenes or textures"),
    ],
)
def test_bad_setting_is_named_in_one_line(setting, message):
    with pytest.raises(ValueError, match=message) as error:
        DigitsConfig(**setting)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("split", "length", "seed"), [("test", 1, 0), ("train", 0, 0), ("train", 1, -1)])
def test_bad_data_set_is_refused(split, length, seed):
    with pytest.raises(ValueError, match="must be"):
        ScatteredDigits(DigitsConfig(), split, length, seed)


def test_index_beyond_the_end_and_many_digits_are_refused():
    data = ScatteredDigits(DigitsConfig(digits=(2, 3)), "train", 5)
    with pytest.raises(ValueError, match="classification needs digits"):
        data[0]
    with pytest.raises(IndexError, match="0 to 4"):
        data.scene(5)


def test_lists_from_a_yaml_file_are_taken():
    assert DigitsConfig(digits=[1, 1], contrast=[0.4, 0.6]) == DigitsConfig()


def test_missing_photograph_names_the_package():
    with pytest.raises(FileNotFoundError, match="no_such is missing from scikit-image: reinstall scikit-image"):
        read_photograph("no_such")
