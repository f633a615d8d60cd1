"""Bad pictures and annotations: each named in one line with what to do; odd pictures shown as a viewer shows them."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from tests import seg_trees as trees
from tests.seg_trees import SQUARE, bands
from train.check_data import main as check_data
from train.common.errors import UserError, run_command
from train.data.coco_masks import to_mask
from train.data.digits import DigitsConfig
from train.data.formats import open_source
from train.data.images import ImageError
from train.data.mask_files import read_ids, read_picture


def refused(load, message):
    """See that a call fails with an ImageError of one line that matches."""
    with pytest.raises(ImageError, match=message) as caught:
        load()
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("mode", "seen"),
    [("1", 255), ("L", 200), ("P", (9, 8, 7)), ("I;16", 128), ("CMYK", (105, 155, 205)), ("LA", 228), ("RGBA", 228)],
)
def test_pictures_of_any_mode_look_as_in_a_viewer(tmp_path, mode, seen):
    """Half-transparent 200 over white is 228; 16-bit 32896 is 128 of 255; CMYK (150, 100, 50, 0) is its complement."""
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 6), 32896, dtype=np.uint16))
    elif mode == "P":
        image = Image.new("P", (6, 4), 1)
        image.putpalette([0, 0, 0, 9, 8, 7])
    else:
        fill = {"1": 1, "L": 200, "CMYK": (150, 100, 50, 0), "LA": (200, 125), "RGBA": (200, 200, 200, 125)}[mode]
        image = Image.new(mode, (6, 4), fill)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    picture = read_picture(path)
    assert picture.shape == (4, 6, 3) and picture.dtype == np.uint8 and picture.flags.writeable
    assert (picture == seen).all()


def test_orientation_mark_is_obeyed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert read_picture(tmp_path / "a.jpg").shape == (6, 4, 3)


def test_pictures_that_cannot_be_shown_are_named(tmp_path):
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "float.tif")
    refused(lambda: read_picture(tmp_path / "float.tif"), "cannot read picture .*float.tif: .*save it with 8 or")
    (tmp_path / "a.png").write_bytes(b"no picture")
    refused(lambda: read_picture(tmp_path / "a.png"), "cannot read picture .*a.png: .*; replace or remove it")
    refused(lambda: read_picture(tmp_path / "b.png"), "no picture .*b.png: put it there")
    Image.new("RGB", (4, 4), (7, 7, 8)).save(tmp_path / "mask.png")
    refused(lambda: read_ids(tmp_path / "mask.png"), "mask.png: it is a colour picture .*one channel")


def test_palette_and_16_bit_masks_are_read_as_numbers(tmp_path):
    image = Image.fromarray(bands(3, 7))
    image.putpalette([5] * 768)
    image.save(tmp_path / "a.png")
    trees.write_png(tmp_path / "b.png", bands(3, 40000, dtype=np.uint16))
    assert np.array_equal(read_ids(tmp_path / "a.png"), bands(3, 7))
    assert np.array_equal(read_ids(tmp_path / "b.png"), bands(3, 40000, dtype=np.int32))


def test_mask_of_another_size_is_named(tmp_path):
    source = open_source(trees.ade20k(tmp_path, [bands(1)[:20]]), "train")
    error = refused(lambda: source.load(0), "0000.png is 60 x 20, but its picture .*0000.jpg is 60 x 40: export both")
    assert pickle.loads(pickle.dumps(error)).kind == error.kind == "mask and picture differ in size"


def test_ids_outside_the_classes_are_counted(tmp_path):
    source = open_source(trees.ade20k(tmp_path / "a", [bands(1, 151, 200)]), "train")
    error = refused(lambda: source.load(0), r"ids outside the 150 classes: 151 \(800 pixels\), 200 \(800 pixels\)")
    assert error.ids == {151: 800, 200: 800}
    trees.cityscapes(tmp_path / "b", [bands(7, 34, 50001, dtype=np.int32)])
    error = refused(lambda: open_source(tmp_path / "b", "train").load(0), "19 classes: 34 .*not labelTrainIds")
    assert error.ids == {34: 800, 50001: 800}
    trees.folder(tmp_path / "c", [bands(1, 2)] * 2, {"names": ["a", "b"]})
    refused(lambda: open_source(tmp_path / "c", "train").load(0), r"2 classes: 2 \(1200 pixels\); name them, or list")


@pytest.mark.parametrize(
    ("polygon", "message"),
    [
        ([[1, 1, 5, 5]], "has 4 numbers"),
        ([[1, 1, 5, 5, 9, 9, 3]], "has 7 numbers"),
        ([[1, 1, 5, 5, float("nan"), 9]], "a point at nan, far outside"),
        ([[1, 1, 5, 5, 5e9, 9]], "a point at 5000000000.0, far outside the picture of 60 x 40"),
        ([["1", 1, 5, 5, 9, 9]], "no list of numbers"),
        ([], "holds no polygon"),
        (None, "holds no polygon"),
        ({"size": [60, 40], "counts": [2400]}, r"for height and width \[60, 40\]"),
        ({"size": [40, 60], "counts": [5, 5]}, "add up to 10 pixels, not 2400"),
        ({"size": [40, 60], "counts": [-5, 2405]}, "no list of whole numbers"),
        ({"size": [40, 60], "counts": "zz~"}, "run lengths"),
        ({"size": ["a" * 50000, 60], "counts": [2400]}, r'for height and width \["a{40,60}\.\.\., the'),
    ],
)
def test_broken_outlines_are_named(tmp_path, polygon, message):
    trees.instances(tmp_path, [(0, 3, [SQUARE], 0), (0, 3, polygon, 0)])
    source = open_source(tmp_path, "train")
    refused(lambda: source.load(0), f"train2017.json: annotation 101 of image 0: .*{message}.*; correct or remove")


def test_a_message_is_short_whatever_it_names():
    error = UserError("a" * 50000 + ": remove it")
    assert len(str(error)) < 2100 and str(error).startswith("aaa") and str(error).endswith(": remove it")


def test_outlines_a_little_outside_are_cut_off():
    assert to_mask([[-9, -9, 9, -9, 9, 9, -9, 9]], 40, 60).sum() == 81


def test_unknown_category_and_missing_picture_are_named(tmp_path):
    source = open_source(trees.instances(tmp_path, [(0, 99, [SQUARE], 0)]), "train")
    refused(lambda: source.load(0), "annotation 100 of image 0 has category_id 99, which is not among its categories")
    (tmp_path / "train2017" / f"{1:012}.png").unlink()
    refused(lambda: source.load(1), r"no picture .*000001.png, named in .*json \(image id 1\): .*--images")


def test_panoptic_segments_must_be_listed_and_drawn(tmp_path):
    ids = bands(0, 5, 9, dtype=np.int32)
    source = open_source(trees.panoptic(tmp_path / "a", ids, [(5, 1, 0)]), "train")
    assert refused(lambda: source.load(0), "list these segments in panoptic_train2017.json").ids == {9: 800}
    source = open_source(trees.panoptic(tmp_path / "b", ids, [(5, 1, 0), (9, 1, 0), (8, 1, 0)]), "train")
    refused(lambda: source.load(0), "lacks segment 8")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable as json"),
        ("[]", "has no list 'images'"),
        ('{"images": [], "categories": [{"id": 1}], "annotations": []}', "entry 0 of 'categories' lacks 'name'"),
    ],
)
def test_a_json_that_is_not_cocos_is_named(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / "a.json", "train")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"things": []}, "cannot be used .'names'.: expected"),
        ({"names": {"1": "a"}, "things": ["b"]}, "'b' under things is not under names"),
        ({"names": {"1": "a"}, "ignore": 1}, "id 1 is named and ignored"),
        ({"names": {"x": "a"}}, "cannot be used"),
        ({"names": {"1000": "a"}, "things": ["a"]}, "ids must be below 1000"),
    ],
)
def test_a_wrong_class_list_is_named(tmp_path, classes, message):
    trees.folder(tmp_path, [bands(1)] * 2, classes)
    with pytest.raises(UserError, match=message):
        open_source(tmp_path, "train")


def test_empty_folders_are_named(tmp_path):
    for name, folder in (("ade20k", "images/training"), ("cityscapes", "leftImg8bit"), ("folder", "images")):
        (tmp_path / name / folder).mkdir(parents=True)
        with pytest.raises(UserError, match="no pictures|no mask"):
            open_source(tmp_path / name, "train")


def run(capsys, *arguments):
    """Run the command and give its exit code, output and errors."""
    code = run_command(check_data, [str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_check_data_reports_what_is_there(tmp_path, capsys):
    trees.ade20k(tmp_path, [bands(0, 1, 1, 3), bands(3)])
    code, out, err = run(capsys, tmp_path)
    assert (code, err) == (0, "")
    assert "ade20k data for semantic segmentation, 150 classes" in out
    assert "train: 2 pictures of 60 x 40 pixels, 3 masks, 12.5 % of the pixels ignored" in out
    assert "class 3                      stuff         2        2  62.50 %" in out
    assert "never met: 148 of 150 classes (class 2, class 4," in out
    assert "note: no val: no pictures in" in out and len(out.splitlines()) < 40


def test_check_data_counts_each_problem_and_says_what_to_do(tmp_path, capsys):
    trees.ade20k(tmp_path, [bands(1, 151), bands(151), bands(1)[:9], bands(2)])
    (tmp_path / "annotations" / "training" / "ADE_training_00000003.png").unlink()
    code, out, _ = run(capsys, tmp_path)
    assert code == 1 and "train: no picture could be used" in out
    assert "PROBLEM (train): ids outside the class list, 2 x; the first: " in out
    assert "unknown ids in all: 151 (3600 pixels)" in out
    assert "mask and picture differ in size, 1 x" in out and "missing mask, 1 x" in out
    assert "4 problems: mend them, or train with on_bad_image skip" in out


def test_check_data_on_a_json(tmp_path, capsys):
    line = [20, 20, 20, 20, 20, 20]
    trees.instances(tmp_path, [(0, 3, [line], 0), (0, 18, [SQUARE], 1), (9, 3, [SQUARE], 0)])
    path = tmp_path / "annotations" / "instances_train2017.json"
    code, out, _ = run(capsys, path, "--images", tmp_path / "train2017")
    assert code == 1 and "1 annotations are of images it does not list (9): remove them" in out
    assert "1 masks without a pixel (first: 0): training leaves them out" in out
    assert "1 pictures without any mask" in out and "1 crowds" in out


def test_check_data_limit_slender_pictures_and_errors(tmp_path, capsys):
    trees.folder(tmp_path, [bands(1)] * 5, {"names": {"1": "a"}})
    trees.write_png(tmp_path / "images" / "p000.png", trees.picture(0, (1, 5000)))
    trees.write_png(tmp_path / "masks" / "p000.png", np.ones((1, 5000), dtype=np.uint8))
    code, out, _ = run(capsys, tmp_path, "--limit", 2)
    assert code == 0 and "train: 2 pictures of 60 x 40 to 5000 x 1 pixels" in out
    assert "1 pictures are more than 20 times as long as wide" in out
    assert run(capsys, tmp_path, "--limit", 0)[0] == run(capsys, tmp_path / "none")[0] == 2


def test_classes_json_is_json(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "classes.json").write_text(json.dumps(["a"]))
    with pytest.raises(UserError, match="cannot be used .*: expected"):
        open_source(tmp_path, "train")


def test_too_many_photographs_are_refused():
    with pytest.raises(ValueError, match="photographs must be a whole number from 1 to 4, got 5"):
        DigitsConfig(photographs=5)
