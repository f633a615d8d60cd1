"""Layouts as people have them and jsons as tools write them: read rightly, or refused in one line."""

import json
import os

import numpy as np
import pytest

from tests import seg_trees as trees
from tests.seg_trees import CATEGORIES, SQUARE, bands, picture, write_png
from train.check_data import main as check_data
from train.common.errors import UserError, run_command
from train.config.segmentation import Config
from train.data.coco_masks import unpack
from train.data.formats import guess, open_source
from train.data.images import ImageError
from train.data.mask_folders import list_files
from train.data.segmentation import open_sets

DRAWN = np.zeros((40, 60), dtype=bool)
DRAWN[5:25, 10:30] = True


def content(split="train", images=2, **changes):
    """Make a COCO json's content: each image has one object, drawn as DRAWN."""
    listed = [{"id": i + 1, "file_name": f"{split}{i}.png", "height": 40, "width": 60} for i in range(images)]
    drawn = [{"id": i + 1, "image_id": i + 1, "category_id": 3, "segmentation": [SQUARE]} for i in range(images)]
    return {"images": listed, "annotations": drawn, "categories": [dict(each) for each in CATEGORIES], **changes}


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def write_pictures(folder, split, images=2):
    for number in range(images):
        write_png(folder / f"{split}{number}.png", picture(number))


def config_of(*paths, **data):
    return Config.model_validate({"data": {"path": [str(path) for path in paths], **data}})


def edited(tmp_path, edit):
    """Write a json with its pictures, after a change."""
    value = content()
    edit(value)
    write_pictures(tmp_path / "images", "train")
    return write_json(tmp_path / "a.json", value)


@pytest.mark.parametrize(
    ("jsons", "pictures"),
    [
        ("annotations/{}.json", "{}"),
        ("annotations/{}.json", "images/{}"),
        ("annotations/{}.json", "images"),
        ("annotations/instances_{}.json", "{}"),
        ("annotations/instances_{}2017.json", "{}2017"),
        ("annotations/instances_{}2017.json", "images/{}2017"),
        ("{}.json", "{}"),
        ("{}.json", "images/{}"),
        ("{}/_annotations.coco.json", "{}"),
    ],
)
@pytest.mark.parametrize("val", ["val", "valid"])
def test_coco_as_people_lay_it(tmp_path, jsons, pictures, val):
    for split in ("train", val):
        write_json(tmp_path / jsons.format(split), content(split))
        write_pictures(tmp_path / pictures.format(split), split)
    assert guess(tmp_path) == "coco"
    for split, name in (("train", "train"), ("val", val)):
        source = open_source(tmp_path, split)
        assert source.task == "instance" and len(source) == 2
        assert source.images[1]["file_name"] == f"{name}1.png"
        sample = source.load(1)
        assert np.array_equal(sample.image, picture(1)) and np.array_equal(sample.masks, [DRAWN])
    alone = open_source(tmp_path / jsons.format("train"), "train")
    assert np.array_equal(alone.load(0).image, picture(0))
    train, test = open_sets(config_of(tmp_path / jsons.format("train"), tmp_path / jsons.format(val)))
    assert np.array_equal(test.source.load(0).image, picture(0)) and len(train) == 2


def test_two_folders_of_pictures_can_be_named(tmp_path):
    for split in ("train", "val"):
        write_json(tmp_path / f"j{split}.json", content(split))
        write_pictures(tmp_path / f"p{split}", split)
    jsons = [tmp_path / f"j{split}.json" for split in ("train", "val")]
    train, val = open_sets(config_of(*jsons, images=[str(tmp_path / "ptrain"), str(tmp_path / "pval")]))
    assert np.array_equal(train.source.load(0).image, val.source.load(0).image)
    assert Config.model_validate({"data": {"images": None}}).data.images == []  # as older checkpoints have it
    assert Config.model_validate({"data": {"images": "x"}}).data.images == ["x"]


def test_a_json_that_is_not_cocos_does_not_hide_a_folder(tmp_path):
    trees.folder(tmp_path, [bands(1)] * 2)
    write_json(tmp_path / "train.json", {"settings": 1})
    assert guess(tmp_path) == "folder"


@pytest.mark.parametrize("inner", [("images/{}", "masks/{}"), ("{}/images", "{}/masks")])
@pytest.mark.parametrize("val", ["val", "validation"])
def test_split_folders_within_images_are_splits(tmp_path, inner, val):
    for split, ids in (("train", [1, 2]), (val, [1, 2, 1])):
        for number, value in enumerate(ids):
            write_png(tmp_path / inner[0].format(split) / f"{split}{number}.png", picture(number))
            write_png(tmp_path / inner[1].format(split) / f"{split}{number}.png", bands(value))
    assert guess(tmp_path) == "folder"
    train, held = (open_source(tmp_path, split) for split in ("train", "val"))
    assert [train.name(i) for i in range(len(train))] == ["train0", "train1"]
    assert [held.name(i) for i in range(len(held))] == [f"{val}0", f"{val}1", f"{val}2"]
    assert held.load(1).labels.tolist() == [1] and len(train.vocabulary.classes) == 2


def test_masks_of_0_and_255_show_an_object(tmp_path, capsys):
    trees.folder(tmp_path, [bands(0, 255)] * 3)
    source = open_source(tmp_path, "train")
    assert [(each.name, each.id) for each in source.vocabulary.classes] == [("class 0", 0), ("class 255", 255)]
    sample = source.load(0)
    assert np.array_equal(sample.masks, [bands(0, 255) == 0, bands(0, 255) == 255]) and not sample.ignore.any()
    assert run_command(check_data, [str(tmp_path)]) == 0
    assert "note: the masks hold 0 and 255 alone: 255 is taken for a class" in capsys.readouterr().out


def test_255_beside_other_classes_is_ignored_and_said(tmp_path, capsys):
    trees.folder(tmp_path, [bands(0, 1, 255)] * 3)
    source = open_source(tmp_path, "train")
    assert [each.id for each in source.vocabulary.classes] == [0, 1]
    assert np.array_equal(source.load(0).ignore, bands(0, 1, 255) == 255)
    run_command(check_data, [str(tmp_path)])
    assert "note: 255 in the masks is ignored" in capsys.readouterr().out


def test_softened_edges_and_too_many_numbers_are_refused(tmp_path):
    soft = bands(0, 255)
    soft[0, :9] = range(20, 200, 20)
    trees.folder(tmp_path / "a", [soft] * 3)
    with pytest.raises(UserError, match="0 and 255 with 9 grey levels between, as softened edges are.*classes.json"):
        open_source(tmp_path / "a", "train")
    many = np.arange(2400, dtype=np.uint16).reshape(40, 60)
    trees.folder(tmp_path / "b", [many] * 3)
    with pytest.raises(UserError, match="hold 2400 different numbers: say in classes.json"):
        open_source(tmp_path / "b", "train")
    trees.folder(tmp_path / "c", [soft] * 3, {"names": {"0": "ground"}, "ignore": list(range(1, 256))})
    assert open_source(tmp_path / "c", "train").load(0).labels.tolist() == [0]


@pytest.mark.parametrize("name", ["{}.tif", "{}_mask.png", "{}.PNG", "{}.bmp"])
def test_masks_of_other_names_are_found(tmp_path, name):
    for number in range(3):
        write_png(tmp_path / "images" / f"p{number}.png", picture(number))
        write_png(tmp_path / "masks" / name.format(f"p{number}"), bands(0, number))
    files = list_files(tmp_path, "train")
    assert [mask.name for _, _, mask in files] == [name.format("p0"), name.format("p1")]
    assert open_source(tmp_path, "train").load(1).labels.tolist() == [0, 1]


def test_masks_that_cannot_be_read_give_their_reason(tmp_path):
    for number in range(2):
        write_png(tmp_path / "images" / f"p{number}.png", picture(number))
        write_png(tmp_path / "masks" / f"p{number}.png", picture(number))
    with pytest.raises(UserError, match="no mask under .* could be read .*p0.png: it is a colour picture"):
        open_source(tmp_path, "train")


def test_linked_folders_are_read_and_unread_kinds_said(tmp_path, capsys):
    trees.folder(tmp_path / "own", [bands(1)] * 3)
    trees.folder(tmp_path / "far", [bands(1)] * 3)
    for kind in ("images", "masks"):
        os.symlink(tmp_path / "far" / kind, tmp_path / "own" / kind / "more")
    (tmp_path / "own" / "images" / "a.heic").write_bytes(b"")
    sources = [open_source(tmp_path / "own", split) for split in ("train", "val")]
    assert sum(map(len, sources)) == 6
    run_command(check_data, [str(tmp_path / "own")])
    assert "1 files left out (1 .heic): save them as .png or .jpg" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mark", "crowd"), [(0, False), ("0", False), (None, False), (False, False), (1, True), ("1", True), (1.0, True)]
)
def test_iscrowd_is_read_as_meant(tmp_path, mark, crowd):
    source = open_source(edited(tmp_path, lambda c: c["annotations"][0].update(iscrowd=mark)), "train")
    assert source.load(0).crowd.tolist() == [crowd]
    assert source.objects == 2 - crowd


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: [a.update(iscrowd=1) for a in c["annotations"]], "all 2 annotations are marked iscrowd"),
        (lambda c: c["annotations"].clear(), "no annotation is of an image that it lists"),
        (lambda c: [a.update(image_id="1") for a in c["annotations"]], "no annotation is of an image that it lists"),
    ],
)
def test_data_without_an_object_are_not_trained_on(tmp_path, edit, message, capsys):
    path = edited(tmp_path, edit)
    with pytest.raises(UserError, match=message):
        open_sets(config_of(path, path))
    with pytest.raises(UserError, match=message):
        open_source(path, "train", skip_empty=True)
    assert run_command(check_data, [str(path)]) == 1
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["images"][1].update(id=1), "'images' list id 1 more than once .1 such ids.: if two files"),
        (lambda c: c["categories"][1].update(id=18), "'categories' list id 18 more than once"),
        (lambda c: c["categories"][1].update(name="dog"), "two classes named 'dog'"),
        (
            lambda c: c["categories"][1].update(id="3"),
            "a category's id must be a whole number, not in",
        ),
        (lambda c: c["images"][1].update(id="3"), "'images' have ids that are numbers and ids that are text"),
        (lambda c: c["categories"][0].update(name=7), "entry 0 of 'categories' has name 7: it must be text in quotes"),
        (lambda c: c["categories"][0].update(name=None), "has name null: it must be text"),
        (lambda c: c["categories"][0].update(isthing="yes"), 'has isthing "yes": it must be 0 or 1'),
        (lambda c: c["categories"].clear(), "lists no categories"),
        (lambda c: c["images"].clear(), "lists no images"),
        (lambda c: c["images"][0].update(file_name=None), "entry 0 of 'images' has file_name null: it must be text"),
        (lambda c: c["images"][0].update(id=[1]), r"has id \[1\]: an id must be a whole number or text"),
        (lambda c: c["images"][0].update(id=True), "has id true: an id must be"),
        (lambda c: c["images"][0].update(id=10**60), "has id a number of many digits"),
        (lambda c: c["images"][0].update(height="40"), 'has height "40": it must be a whole number of pixels'),
        (lambda c: c["images"][0].update(width=0), "has width 0: it must be a whole number of pixels"),
        (lambda c: c["images"][0].update(width=10**9), "40 pixels, more than 67,108,864"),
        (lambda c: c["images"].append(3), "entry 2 of 'images' is no object"),
        (lambda c: c["annotations"][0].update(image_id={}), "entry 0 of 'annotations' has image_id {}"),
        (lambda c: c["annotations"][0].pop("image_id"), "entry 0 of 'annotations' lacks 'image_id'"),
    ],
)
def test_odd_jsons_are_refused_in_one_line(tmp_path, edit, message):
    path = edited(tmp_path, edit)
    with pytest.raises(UserError, match=message) as caught:
        open_source(path, "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda a: a.update(category_id="3"), 'category_id "3" .which is text, the ids are numbers., which is not'),
        (lambda a: a.update(category_id=[3]), r"has category_id \[3\], which is not"),
        (lambda a: a.update(iscrowd="yes"), 'has iscrowd "yes": it must be 0 or 1'),
        (lambda a: a.update(segmentation=[[10**400, 1, 5, 5, 9, 9]]), "a point at 1000.*, far outside"),
        (lambda a: a.update(segmentation={"size": [40, 60], "counts": "o" * 2000}), "no text that COCO packs"),
        (lambda a: a.update(segmentation={"size": [40, 60], "counts": "1é2"}), "no text that COCO packs"),
        (lambda a: a.update(segmentation={"size": [40, 60], "counts": [10**30]}), "add up to 1000"),
    ],
)
def test_odd_annotations_are_named_and_the_others_used(tmp_path, edit, message):
    source = open_source(edited(tmp_path, lambda c: edit(c["annotations"][0])), "train")
    with pytest.raises(ImageError, match=message):
        source.load(0)
    assert np.array_equal(source.load(1).masks, [DRAWN])


def test_packed_runs_end():
    with pytest.raises(ValueError, match="no text that COCO packs"):
        unpack(b"o" * 10_000_000)  # every character says that the run goes on: quadratic time, were it read to the end


def test_more_masks_than_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("train.data.coco.MOST_BYTES", 2 * 2400)
    path = edited(tmp_path, lambda c: c["annotations"].extend([c["annotations"][0]] * 2))
    with pytest.raises(ImageError, match="3 annotations on 60 x 40 pixels, too many to hold"):
        open_source(path, "train").load(0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 100_000, "not readable as json"),
        (b'{"images": 1' + b"0" * 5000 + b"}", "not readable as json"),
        ('{"images": ["é"]}'.encode("latin-1"), "not in UTF-8"),
    ],
)
def test_files_that_are_no_json_are_refused(tmp_path, text, message):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / "a.json", "train")


def test_byte_order_marks_points_and_pipes(tmp_path):
    path = edited(tmp_path, lambda c: [i.update(height=40.0, width=60.0, id=float(i["id"])) for i in c["images"]])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    source = open_source(path, "train")
    assert np.array_equal(source.load(1).masks, [DRAWN]) and source.name(1) == "2"
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UserError, match="no file .*pipe.json"):
        open_source(tmp_path / "pipe.json", "train")


@pytest.mark.parametrize(
    ("colour", "expected"),
    [("#ff6600", (255, 102, 0)), ("red", (255, 0, 0)), (None, None), ([255, 0, 0, 255], (255, 0, 0))]
    + [([1, 2, 3], (1, 2, 3)), (16711680, None), ("no colour", None), ([1, 2], None), ([1, 2, 300], None)],
)
def test_colours_of_any_tool(tmp_path, colour, expected):
    path = edited(tmp_path, lambda c: c["categories"][0].update(color=colour))
    found = {each.name: each.color for each in open_source(path, "train").vocabulary.classes}
    assert found == {"dog": expected, "car": None}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda a: a["segments_info"][0].pop("id"), "a segment has id null, not a whole number"),
        (lambda a: a["segments_info"][0].update(id="5"), 'a segment has id "5"'),
        (lambda a: a["segments_info"].append(a["segments_info"][0]), "segment 5 is listed more than once"),
        (lambda a: a.update(segments_info=None), "segments_info is no list of segments"),
        (lambda a: a.update(file_name=None), "has file_name null: name its PNG file"),
    ],
)
def test_odd_segments_are_named(tmp_path, edit, message):
    trees.panoptic(tmp_path, bands(0, 5, dtype=np.int32), [(5, 1, 0)])
    path = tmp_path / "annotations" / "panoptic_train2017.json"
    value = json.loads(path.read_text())
    edit(value["annotations"][0])
    write_json(path, value)
    with pytest.raises(ImageError, match=message):
        open_source(tmp_path, "train").load(0)


def test_a_second_annotation_of_a_picture_is_named(tmp_path):
    trees.panoptic(tmp_path, bands(0, 5, dtype=np.int32), [(5, 1, 0)])
    path = tmp_path / "annotations" / "panoptic_train2017.json"
    value = json.loads(path.read_text())
    value["annotations"] *= 2
    write_json(path, value)
    with pytest.raises(ImageError, match="has 2 annotations of image 7, not one"):
        open_source(tmp_path, "train").load(0)


def test_a_picture_turned_by_its_camera_mark_is_named(tmp_path):
    path = edited(tmp_path, lambda c: [i.update(height=60, width=40) for i in c["images"]])
    with pytest.raises(ImageError, match="image 1 is 40 x 60, but .*train0.png is shown turned: save it turned"):
        open_source(path, "train").load(0)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"names": {"0": 0, "1": 7}}, "must be text in quotes"),
        ({"names": {"1": "a", "01": "b"}}, "names one id twice"),
        ({"names": {"1": "a", "2": "a"}}, "two classes named 'a'"),
        ({"names": {"1": "a"}, "things": [1]}, "must be text in quotes"),
        ({"names": {"1": "a"}, "ignore": [1.5]}, "1.5 is no id"),
        ({"names": {"-1": "a"}}, "is no id"),
        ([1], "cannot be used"),
    ],
)
def test_odd_class_lists_are_refused(tmp_path, classes, message):
    trees.folder(tmp_path, [bands(1)] * 2)
    write_json(tmp_path / "classes.json", classes)
    with pytest.raises(UserError, match=message):
        open_source(tmp_path, "train")


def test_sixty_thousand_classes_are_read(tmp_path):
    def edit(value):
        value["categories"] = [{"id": i, "name": f"class {i}"} for i in range(60_000)]

    source = open_source(edited(tmp_path, edit), "train")
    assert source.vocabulary.num_classes == 60_000 and source.load(1).labels.tolist() == [3]
    (tmp_path / "a.json").unlink()
    trees.ade20k(tmp_path / "ade", [bands(1)]).joinpath("objectInfo150.txt").write_bytes(
        "Idx\tName\n1\tmür".encode("latin-1")
    )
    with pytest.raises(UserError, match="objectInfo150.txt is not in UTF-8"):
        open_source(tmp_path / "ade", "train")


def test_boxes_stand_for_masks_only_where_asked_and_it_is_said(tmp_path, capsys):
    def edit(value):
        value["annotations"][0].update(segmentation=[], bbox=[9.6, 5, 20.2, 20])
        value["annotations"][1].pop("segmentation")
        value["annotations"][1].update(bbox=[-5, 30, 100, 100])

    path = edited(tmp_path, edit)
    with pytest.raises(ImageError, match="its segmentation holds no polygon.*--data.boxes"):
        open_source(path, "train").load(0)
    source = open_source(path, "train", boxes=True)
    assert np.array_equal(source.load(0).masks, [DRAWN])
    below = np.zeros((40, 60), dtype=bool)
    below[30:] = True
    assert np.array_equal(source.load(1).masks, [below])
    assert source.notes == ["2 of 2 objects have no outline: their boxes are taken for masks"]
    train, _ = open_sets(config_of(path, path, boxes=True))
    assert np.array_equal(train.source.load(0).masks, [DRAWN])
    assert run_command(check_data, [str(path), "--boxes"]) == 0
    assert "note: 2 of 2 objects have no outline: their boxes are taken" in capsys.readouterr().out
    assert open_source(edited(tmp_path, lambda c: None), "train", boxes=True).notes == []


@pytest.mark.parametrize(
    "box", [None, [1, 2, 3], [1, 2, 3, "4"], [1, 2, float("nan"), 4], [1, 2, -3, 4], [1, 2, 1e9, 4]]
)
def test_odd_boxes_are_named(tmp_path, box):
    path = edited(tmp_path, lambda c: c["annotations"][0].update(segmentation=None, bbox=box))
    with pytest.raises(ImageError, match="annotation 1 of image 1: its (segmentation|box)"):
        open_source(path, "train", boxes=True).load(0)
