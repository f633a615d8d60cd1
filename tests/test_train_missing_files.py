"""Pictures or masks that are not there are noticed before training, not at the first evaluation."""

import pytest

from tests import seg_trees as trees
from tests.seg_train_cases import config_of
from tests.seg_trees import bands
from tests.test_seg_data_kinds import content, write_json, write_pictures
from train.common.errors import UserError
from train.data.segmentation import check_pictures, open_sets


def coco(root):
    for split in ("train", "val"):
        write_json(root / f"{split}.json", content(split, 3))
        write_pictures(root / split, split, 3)
    return root / "val"


def folder(root):
    for split in ("train", "val"):
        trees.folder(root / split, [bands(0, 1)] * 3)
    return root / "val" / "masks"


def ade20k(root):
    for split in ("training", "validation"):
        trees.ade20k(root, [bands(0, 1, 2)] * 3, split)
    return root / "annotations" / "validation"


@pytest.mark.parametrize("make", [coco, folder, ade20k])
def test_validation_files_that_are_missing_are_noticed_at_the_start(tmp_path, make):
    held = make(tmp_path)
    first, *others = sorted(path for path in held.rglob("*") if path.is_file())
    first.unlink()
    sets = open_sets(config_of("--data", tmp_path, "--data.task", "null", "--model.num_classes", "null"))
    check_pictures(sets[0].source, "stop")
    with pytest.raises(UserError, match=f"1 of 3 pictures, or their masks, are not there: no .*{first.name}"):
        check_pictures(sets[1].source, "stop")
    check_pictures(sets[1].source, "skip")
    assert any(
        "1 of 3 pictures, or their masks, are not there and are skipped" in note for note in sets[1].source.notes
    )
    for path in others:
        path.unlink()
    with pytest.raises(UserError, match="3 of 3 pictures, or their masks, are not there: no ") as caught:
        check_pictures(sets[1].source, "skip")
    assert "\n" not in str(caught.value)


def test_training_looks_before_it_begins(tmp_path):
    from tests.seg_train_cases import run_of

    held = folder(tmp_path)
    for path in held.iterdir():
        path.unlink()
    config = config_of("--data", tmp_path, "--data.task", "semantic", "--model.num_classes", "null")
    with pytest.raises(UserError, match="3 of 3 pictures, or their masks, are not there: no mask .*p000.png"):
        run_of(config)
