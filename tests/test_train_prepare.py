"""train.prepare: trees of one mask file an object become COCO's form, split by name, and nothing is written over."""

import json
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.seg_trees import write_png
from train.common.errors import run_command
from train.data.masks import decode
from train.prepare import main as prepare
from train.prepare import split_of

SHAPE = (20, 30)
NAMES = [f"{i:02}-cell-picture-of-a-long-name" for i in range(24)]


def mask_of(number, k):
    """Draw object k of picture ``number``: 4 rows of 5 pixels, from column 6 k on."""
    mask = np.zeros(SHAPE, dtype=np.uint8)
    mask[number % 10 : number % 10 + 4, 6 * k : 6 * k + 5] = 255
    return mask


def write_tree(root, names=NAMES):
    """Write NAME/images and NAME/masks with one to three objects each; pictures are RGBA, as the download has them."""
    for number, name in enumerate(names):
        picture = np.full((*SHAPE, 4), 255, dtype=np.uint8)
        picture[..., :3] = np.random.default_rng(number).integers(0, 256, (*SHAPE, 3))
        write_png(root / name / "images" / f"{name}.png", picture)
        for k in range(1 + number % 3):
            write_png(root / name / "masks" / f"{k}.png", mask_of(number, k))
    return root


def run(capsys, *arguments):
    """Run the command: exit code, output and errors."""
    code = run_command(prepare, [str(each) for each in arguments])
    return code, *capsys.readouterr()


def test_splits_follow_the_crc_of_the_name():
    assert zlib.crc32(b"123456789") == 0xCBF43926  # the published check value: 3421780262, modulo 10: 2
    assert split_of("123456789") == "train"
    found = {name: zlib.crc32(name.encode()) % 10 for name in NAMES}
    assert {0, 1} < set(found.values())
    assert all(split_of(n) == ("test" if r == 0 else "val" if r == 1 else "train") for n, r in found.items())


@pytest.mark.parametrize("packed", [False, True])
def test_nuclei_become_coco(tmp_path, capsys, packed):
    tree = write_tree(tmp_path / "download" / "stage1")
    write_png(tree / NAMES[5] / "masks" / "nothing.png", np.zeros(SHAPE, dtype=np.uint8))
    source = tmp_path / "download"
    if packed:
        source = tmp_path / "download.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for path in sorted(tree.rglob("*.png")):
                archive.write(path, path.relative_to(tree.parent))
            archive.writestr("__MACOSX/x/images/a.png", b"no picture")
    code, out, _ = run(capsys, "nuclei", source, tmp_path / "out")
    assert code == 0 and "0 pictures left out" in out
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == sorted(
        ["train", "val", "test", "train.json", "val.json", "test.json"]
    )
    met = []
    for split in ("train", "val", "test"):
        content = json.loads((tmp_path / "out" / f"{split}.json").read_text())
        assert content["categories"] == [{"id": 1, "name": "nucleus"}]
        mine = [number for number, name in enumerate(NAMES) if split_of(name) == split]
        assert [each["file_name"] for each in content["images"]] == [f"{NAMES[i][:16]}.png" for i in mine]
        assert [each["id"] for each in content["images"]] == list(range(1, len(mine) + 1))
        assert [each["id"] for each in content["annotations"]] == list(range(1, len(content["annotations"]) + 1))
        for image, number in zip(content["images"], mine, strict=True):
            assert (image["width"], image["height"]) == (30, 20)
            with Image.open(tmp_path / "out" / split / image["file_name"]) as picture:
                assert picture.mode == "RGB"
                expected = np.random.default_rng(number).integers(0, 256, (*SHAPE, 3))
                assert np.array_equal(np.asarray(picture), expected)
            objects = [each for each in content["annotations"] if each["image_id"] == image["id"]]
            assert len(objects) == 1 + number % 3
            for k, each in enumerate(objects):
                assert isinstance(each["segmentation"]["counts"], str)
                assert np.array_equal(decode(each["segmentation"]), mask_of(number, k) > 0)
                assert each["bbox"] == [6 * k, number % 10, 5, 4] and each["area"] == 20
                assert each["category_id"] == 1 and each["iscrowd"] == 0
        met += mine
    assert sorted(met) == list(range(len(NAMES)))


def test_large_and_unmasked_pictures_are_left_out_and_said(tmp_path, capsys):
    tree = write_tree(tmp_path / "tree")
    (tree / NAMES[1] / "masks" / "0.png").unlink()
    (tree / NAMES[1] / "masks" / "1.png").unlink()
    write_png(tree / NAMES[2] / "images" / f"{NAMES[2]}.png", np.zeros((20, 31, 3), dtype=np.uint8))
    code, out, _ = run(capsys, "masks", tree, tmp_path / "out", "--category", "cell", "--longest", 30)
    assert code == 0 and "2 pictures left out" in out
    assert f"left out {NAMES[1]}: 1 pictures and 0 masks" in out
    assert f"left out {NAMES[2]}: 31 x 20 pixels, more than 30" in out
    contents = [json.loads((tmp_path / "out" / f"{split}.json").read_text()) for split in ("train", "val", "test")]
    assert sum(len(content["images"]) for content in contents) == len(NAMES) - 2
    assert contents[0]["categories"] == [{"id": 1, "name": "cell"}]


def test_nothing_is_written_over_and_mistakes_leave_nothing(tmp_path, capsys):
    tree = write_tree(tmp_path / "tree")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.json").write_text("mine")
    code, _, error = run(capsys, "nuclei", tree, tmp_path / "mine")
    assert code == 2 and "not empty" in error and (tmp_path / "mine" / "train.json").read_text() == "mine"
    write_png(tree / NAMES[3] / "masks" / "0.png", np.zeros((5, 5), dtype=np.uint8))
    code, _, error = run(capsys, "nuclei", tree, tmp_path / "out")
    assert code == 2 and f"{NAMES[3]}/masks/0.png is 5 x 5, its picture 30 x 20" in error
    assert sorted(each.name for each in tmp_path.iterdir()) == ["mine", "tree"]


def test_what_is_no_such_tree_is_named(tmp_path, capsys):
    (tmp_path / "a.zip").write_bytes(b"PK no zip")
    write_png(tmp_path / "flat" / "images" / "a.png", np.zeros((4, 4, 3), dtype=np.uint8))
    write_tree(tmp_path / "twice" / "a", NAMES[:1])
    write_tree(tmp_path / "twice" / "b", NAMES[:1])
    for source, message in (
        ("a.zip", "no folder and no .zip"),
        ("none", "no folder and no .zip"),
        ("flat", "no picture with masks"),
        ("twice", "in two folders"),
    ):
        code, _, error = run(capsys, "nuclei", tmp_path / source, tmp_path / "out")
        assert code == 2 and message in error and not (tmp_path / "out").exists()
    code, _, error = run(capsys, "masks", tmp_path / "twice", tmp_path / "out")
    assert code == 2 and "--category" in error
