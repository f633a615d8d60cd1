"""Data sets in their official layouts are read back exactly."""

import json

import numpy as np
import pytest
from cityscapesscripts.preparation.createPanopticImgs import convert2panoptic

from tests import seg_trees as trees
from tests.seg_trees import SQUARE, bands, picture
from train.common.errors import UserError
from train.data import mask_folders as folders
from train.data.digit_parts import KINDS, kinds_of
from train.data.digits import CLASSES, DigitsConfig
from train.data.digits_segmentation import DigitsSource, find_parts, vocabulary
from train.data.formats import guess, open_source, tasks_of
from train.data.sample import TASKS

IDS = bands(7, 24, 24001, 24002, 26001, 29001, 0, 11, dtype=np.int32)  # road, people (crowd, two), car, caravan, void


@pytest.fixture(scope="module")
def digits():
    return DigitsSource("train", 12, seed=3, epochs=2)


def same(one, other):
    """Compare two samples part by part."""
    names = ("image", "masks", "labels", "crowd", "ignore")
    return one.name == other.name and all(np.array_equal(getattr(one, n), getattr(other, n)) for n in names)


def test_ade20k(tmp_path):
    masks = [bands(0, 1, 150), bands(3)]
    source = open_source(trees.ade20k(tmp_path, masks), "train")
    assert (len(source), source.task, source.vocabulary.num_classes) == (2, "semantic", 150)
    first, second = source.load(0), source.load(1)
    assert first.labels.tolist() == [0, 149] and second.labels.tolist() == [2]
    assert np.array_equal(first.masks, [masks[0] == 1, masks[0] == 150]) and not first.crowd.any()
    assert np.array_equal(first.ignore, masks[0] == 0) and not second.ignore.any()
    assert first.name == source.name(0) == "ADE_training_00000000"
    assert [each.name for each in source.vocabulary.classes[:2]] == ["class 1", "class 2"]


def test_ade20k_names_come_from_its_own_table(tmp_path):
    rows = [
        "Idx\tRatio\tTrain\tVal\tName",
        "1\t0.2\t11\t12\twall",
        "8 \t0.02\t19\t19\tbed ",
        "2\t0.1\t6\t6\ta, b",
    ]
    trees.ade20k(tmp_path, [bands(1)]).joinpath("objectInfo150.txt").write_text("\n".join(rows))
    names = [each.name for each in open_source(tmp_path, "train").vocabulary.classes]
    assert [names[0], names[1], names[2], names[7]] == ["wall", "a", "class 3", "bed"]


@pytest.mark.parametrize(
    ("task", "classes", "expected"),
    [
        ("semantic", 19, [(0, [7], 0), (2, [11], 0), (11, [24, 24001, 24002], 0), (13, [26001], 0)]),
        ("instance", 8, [(0, [24], 1), (0, [24001], 0), (0, [24002], 0), (2, [26001], 0)]),
        (
            *("panoptic", 19),
            [(0, [7], 0), (2, [11], 0), (11, [24], 1), (11, [24001], 0), (11, [24002], 0), (13, [26001], 0)],
        ),
    ],
)
def test_cityscapes(tmp_path, task, classes, expected):
    source = open_source(trees.cityscapes(tmp_path, [IDS]), "train", task)
    sample = source.load(0)
    assert source.vocabulary.num_classes == classes
    assert list(zip(sample.labels, sample.crowd, strict=True)) == [(label, crowd) for label, _, crowd in expected]
    assert np.array_equal(sample.masks, [np.isin(IDS, ids) for _, ids, _ in expected])
    assert np.array_equal(sample.ignore, np.isin(IDS, [29001, 0]))
    assert np.array_equal(sample.image, picture(0)) and sample.name == "aachen_000000_000019"


def test_cityscapes_knows_its_countable_classes(tmp_path):
    classes = open_source(trees.cityscapes(tmp_path, [IDS]), "train").vocabulary
    assert sorted(classes.things) == list(range(11, 19)) and classes.label_of[33] == 18
    assert classes.classes[13].name == "car" and classes.classes[13].color == (0, 0, 142)


def test_cityscapes_panoptic_json_holds_the_same_as_instance_ids(tmp_path):
    trees.cityscapes(tmp_path, [IDS, bands(7, 33001, dtype=np.int32)], "val")
    drawn = [open_source(tmp_path, "val", "panoptic").load(index) for index in range(2)]
    convert2panoptic(cityscapesPath=str(tmp_path / "gtFine"), setNames=["val"])
    for path in tmp_path.rglob("*_instanceIds.png"):
        path.unlink()
    source = open_source(tmp_path, "val", "panoptic")
    assert source.path.name == "cityscapes_panoptic_val.json"
    assert all(same(source.load(index), drawn[index]) for index in range(2))


def test_coco_instances(tmp_path):
    blob = picture(5)[..., 0] > 128
    annotations = [(1, 18, [SQUARE], 0), (1, 3, trees.packed(blob), 0), (1, 3, trees.runs(~blob), 1)]
    source = open_source(trees.instances(tmp_path, annotations), "train")
    assert [each.name for each in source.vocabulary.classes] == ["car", "dog"] and source.task == "instance"
    bare, sample = source.load(0), source.load(1)
    assert bare.masks.shape == (0, 40, 60) and bare.labels.shape == (0,)
    square = np.zeros((40, 60), dtype=bool)
    square[5:25, 10:30] = True
    assert np.array_equal(sample.masks, [square, blob, ~blob])
    assert sample.labels.tolist() == [1, 0, 0] and sample.crowd.tolist() == [False, False, True]
    assert sample.name == "1" and not sample.ignore.any() and np.array_equal(sample.image, picture(1))


def test_coco_can_leave_out_pictures_without_objects(tmp_path):
    trees.instances(tmp_path, [(2, 3, [SQUARE], 0), (1, 3, [SQUARE], 1)], images=3)
    source = open_source(tmp_path, "train", skip_empty=True)
    assert [source.name(index) for index in range(len(source))] == ["2"] and source.load(0).labels.tolist() == [0]


def test_coco_panoptic(tmp_path):
    ids = bands(0, 70000, 300, 5, 6, dtype=np.int32)
    segments = [(70000, 1, 0), (300, 1, 1), (5, 184, 0), (6, 184, 0)]
    source = open_source(trees.panoptic(tmp_path, ids, segments), "train")
    sample = source.load(0)
    assert source.task == "panoptic" and source.vocabulary.things == {0}
    assert sample.labels.tolist() == [1, 0, 0] and sample.crowd.tolist() == [False, True, False]
    assert np.array_equal(sample.masks, [np.isin(ids, [5, 6]), ids == 300, ids == 70000])
    assert np.array_equal(sample.ignore, ids == 0)


def test_any_coco_json_with_its_pictures_elsewhere(tmp_path):
    trees.instances(tmp_path / "a", [(0, 3, [SQUARE], 0)])
    (tmp_path / "a" / "train2017").rename(tmp_path / "photographs")
    path = tmp_path / "a" / "annotations" / "instances_train2017.json"
    source = open_source(path, "train", images=tmp_path / "photographs")
    assert (source.task, len(source), source.load(0).labels.tolist()) == ("instance", 2, [0])


def test_folder_without_classes_takes_the_ids_found(tmp_path):
    source = open_source(trees.folder(tmp_path, [bands(0, 9), bands(4, 255), bands(9)]), "train")
    assert [each.id for each in source.vocabulary.classes] == [0, 4, 9] and source.task == "semantic"
    sample = source.load(1)
    assert sample.labels.tolist() == [1] and np.array_equal(sample.ignore, bands(4, 255) == 255)
    held = folders.list_files(tmp_path, "val")
    assert [name for name, _, _ in held] == ["p002"] and not set(held) & set(source.files)


def test_folder_with_classes_things_and_splits(tmp_path):
    classes = {"names": {"1": "cat", "7": "grass"}, "things": ["cat"], "ignore": 0}
    ids = bands(7, 1, 1001, 1002, 0, dtype=np.uint16)
    for split in ("train", "val"):
        trees.folder(tmp_path / split, [ids])
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    panoptic = open_source(tmp_path, "val").load(0)
    assert panoptic.labels.tolist() == [0, 1, 0, 0] and panoptic.crowd.tolist() == [True, False, False, False]
    assert np.array_equal(panoptic.masks, [ids == 1, ids == 7, ids == 1001, ids == 1002])
    assert open_source(tmp_path, "val", "instance").load(0).labels.tolist() == [0, 0, 0]
    semantic = open_source(tmp_path, "train", "semantic").load(0)
    assert np.array_equal(semantic.masks, [np.isin(ids, [1, 1001, 1002]), ids == 7])


def test_digits_cover_every_pixel_once_and_agree_between_tasks(digits):
    kinds = set()
    for index in range(12):
        found = {task: find_parts(digits.pictures.scene(index), task) for task in TASKS}
        for task in ("semantic", "panoptic"):
            assert (np.sum([mask for _, mask in found[task]], axis=0) == 1).all()
        things = [part for part in found["panoptic"] if part[0] < 10]
        assert all(np.array_equal(a[1], b[1]) for a, b in zip(things, found["instance"], strict=True))
        labels = [label for label, _ in found["semantic"]]
        assert len(set(labels)) == len(labels) and set(labels) == {label for label, _ in found["panoptic"]}
        kinds.add(sum(label >= 10 for label in labels))
    assert kinds == {1, 2}


def test_digits_sample_is_its_parts(digits):
    sample, parts = digits.load(3), find_parts(digits.pictures.scene(3), "panoptic")
    assert sample.labels.tolist() == [label for label, _ in parts] and np.array_equal(
        sample.masks, [m for _, m in parts]
    )
    assert not sample.ignore.any() and not sample.crowd.any() and sample.name == digits.name(3) == "digits_train_000003"
    assert [vocabulary(task).num_classes for task in TASKS] == [16, 10, 16]
    assert vocabulary("panoptic").things == set(range(10))


def test_digits_are_new_in_every_epoch_and_the_same_again(digits):
    assert same(digits.load(2, 1), DigitsSource("train", 12, seed=3, epochs=2).load(2, 1))
    assert not np.array_equal(digits.load(2, 0).image, digits.load(2, 1).image)


def test_digits_on_bare_ground():
    source = DigitsSource("train", 1, look=DigitsConfig(digits=(0, 0), photographs=4))
    sample = source.load(0)
    assert (sample.masks.sum(axis=0) == 1).all() and (sample.labels >= 10).all()
    source.task = "instance"
    assert source.load(0).masks.shape == (0, 64, 64)


def test_digits_on_textures_have_the_textures_kinds():
    source = DigitsSource("val", 20, look=DigitsConfig(backgrounds="textures", photographs=2))
    assert [each.name for each in source.vocabulary.classes][10:] == list(kinds_of("textures"))
    for index in range(20):
        sample, scene = source.load(index), source.pictures.scene(index)
        assert (sample.masks.sum(axis=0) == 1).all()
        for label, mask in zip(sample.labels, sample.masks, strict=True):
            name = source.vocabulary.classes[label].name
            assert name in CLASSES or (scene.ground[mask] == KINDS.index(name)).all()


def test_layouts_are_told_apart(tmp_path):
    trees.ade20k(tmp_path / "a", [bands(1)])
    trees.cityscapes(tmp_path / "b", [IDS])
    trees.instances(tmp_path / "c", [])
    trees.folder(tmp_path / "d", [bands(1)])
    kinds = [guess(tmp_path / name) for name in "abcd"]
    assert kinds == ["ade20k", "cityscapes", "coco", "folder"]
    assert [tasks_of(tmp_path / n, k)[-1] for n, k in zip("abc", kinds, strict=False)] == [
        *("semantic", "panoptic", "instance")
    ]
    with pytest.raises(UserError, match="looks like no known data set: expected ADE20K"):
        guess(tmp_path)
    with pytest.raises(UserError, match="are for semantic, not for panoptic"):
        open_source(tmp_path / "a", "train", "panoptic")
