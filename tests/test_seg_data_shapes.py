"""labelme's and Pascal VOC's data: read, trained and evaluated on, or refused in one line that names the file."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.seg_train_cases import fit
from tests.seg_trees import picture, write_png
from train.check_data import main as check_data
from train.common.errors import UserError, run_command
from train.data.formats import guess, open_source, tasks_of
from train.data.mask_files import DataError

SHAPE = (40, 60)
DRAWN = np.zeros(SHAPE, dtype=bool)
DRAWN[5:25, 10:30] = True
CORNERS = [[10, 5], [30, 5], [30, 25], [10, 25]]
SQUARE = {"label": "cat", "points": CORNERS, "shape_type": "polygon", "group_id": None}
BOMB = '<!DOCTYPE a [<!ENTITY b "cat"><!ENTITY c "&b;&b;&b;&b;">]>'
BOX = "<bndbox><xmin>11</xmin><ymin>6</ymin><xmax>30</xmax><ymax>25</ymax></bndbox>"
OBJECT = f"<object><name>cat</name><difficult>0</difficult>{BOX}</object>"


def labelme(path, *shapes, **changes):
    """Write a json of labelme's, and its picture beside it."""
    write_png(path.with_suffix(".png"), picture(0))
    content = {"version": "5.4.1", "shapes": list(shapes) or [SQUARE], "imagePath": f"{path.stem}.png"}
    path.write_text(json.dumps(content | {"imageHeight": 40, "imageWidth": 60, "imageData": None} | changes))
    return path


def labelme_tree(root):
    """Write three pictures for training and one for validation, of cats and dogs."""
    for split, count in (("train", 3), ("val", 1)):
        for number in range(count):
            dog = {"label": "dog", "points": [[40, 10], [55, 35]], "shape_type": "rectangle"}
            labelme(root / split / f"{number}.json", SQUARE, dog)
    return root


def voc(root, xml=OBJECT, size=(40, 60), before="", names=("a", "b")):
    """Write pictures with boxes; the first is for training, the second for validation."""
    for split, name in zip(("train", "val"), names, strict=False):
        write_png(root / "JPEGImages" / f"{name}.png", picture(0))
        (root / "Annotations").mkdir(exist_ok=True)
        text = f"<size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>{xml}"
        path = root / "Annotations" / f"{name}.xml"
        path.write_text(f"{before}<annotation><filename>{name}.png</filename>{text}</annotation>")
        (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(f"{name}\n")
    return root


def write_palette(path, values):
    """Write a PNG with a palette, as VOC's are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.frombytes("P", values.shape[::-1], values.astype(np.uint8).tobytes())
    image.putpalette([value for i in range(256) for value in (i, 255 - i, 7 * i % 256)])
    image.save(path)


def voc_masks(root, names=("a", "b")):
    """Add masks to VOC's tree: two cats (8) that touch, a dog (12), and a void rim."""
    classes, objects = np.zeros(SHAPE, dtype=int), np.zeros(SHAPE, dtype=int)
    classes[5:25, 10:30], objects[5:25, 10:20], objects[5:25, 20:30] = 8, 1, 2
    classes[30:38, 40:50], objects[30:38, 40:50] = 12, 3
    for mask in (classes, objects):
        mask[4, 10:30] = 255
    for split, name in zip(("train", "val"), names, strict=True):
        write_palette(root / "SegmentationClass" / f"{name}.png", classes)
        write_palette(root / "SegmentationObject" / f"{name}.png", objects)
        (root / "ImageSets" / "Segmentation").mkdir(exist_ok=True, parents=True)
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(f"{name}\n")
    return classes, objects


def load(root, split="train", index=0, **options):
    return open_source(root, split, **options).load(index)


def names_of(source):
    return [each.name for each in source.vocabulary.classes]


def test_labelme_shapes_are_drawn(tmp_path):
    disc = {"label": "disc", "points": [[30, 20], [30, 30]], "shape_type": "circle"}
    flipped = {"label": "cat", "points": [[30, 25], [10, 5]], "shape_type": "rectangle"}
    old = {"label": " cat ", "points": CORNERS}
    labelme(tmp_path / "train" / "a.json", SQUARE, disc, flipped, old)
    assert guess(tmp_path) == "labelme" and tasks_of(tmp_path, "labelme") == ("semantic", "instance")
    source = open_source(tmp_path, "train")
    assert names_of(source) == ["cat", "disc"] and source.task == "instance" and source.name(0) == "train/a"
    sample = source.load(0)
    assert np.array_equal(sample.image, picture(0)) and sample.labels.tolist() == [0, 1, 0, 0]
    for number in (0, 2, 3):
        assert np.array_equal(sample.masks[number], DRAWN)
    y, x = np.mgrid[:40, :60] + 0.5
    true = (x - 30) ** 2 + (y - 20) ** 2 <= 100
    assert (sample.masks[1] & true).sum() / (sample.masks[1] | true).sum() > 0.95
    assert not sample.crowd.any() and not sample.ignore.any()


def test_labelme_groups_are_one_object_of_a_label(tmp_path):
    def part(label, x, group):
        points = [[x, 5], [x + 5, 10]]
        return {"label": label, "points": points, "shape_type": "rectangle", "group_id": group}

    labelme(
        tmp_path / "train" / "a.json", part("cat", 0, 1), part("cat", 20, 1), part("dog", 40, 1), part("cat", 30, 2)
    )
    sample = load(tmp_path)
    assert sample.labels.tolist() == [0, 1, 0]
    assert [np.flatnonzero(mask.any(0)).tolist() for mask in sample.masks] == [
        [*range(5), *range(20, 25)], [*range(40, 45)], [*range(30, 35)],
    ]  # fmt: skip


def test_labelme_for_semantic_segmentation_paints_and_ignores(tmp_path):
    over = {"label": "dog", "points": [[20, 5], [40, 25]], "shape_type": "rectangle"}
    unsure = {"label": "__ignore__", "points": [[0, 30], [60, 40]], "shape_type": "rectangle"}
    labelme(tmp_path / "train" / "a.json", SQUARE, over, unsure)
    source = open_source(tmp_path, "train", "semantic")
    assert names_of(source) == ["background", "cat", "dog"]
    sample = source.load(0)
    expected = np.zeros(SHAPE, dtype=int)
    expected[5:25, 10:20], expected[5:25, 20:40] = 1, 2
    assert sample.labels.tolist() == [0, 1, 2]
    assert np.array_equal(sample.ignore, np.arange(40)[:, None].repeat(60, 1) >= 30)
    assert np.array_equal(sample.masks, (expected == [[[0]], [[1]], [[2]]]) & ~sample.ignore)
    single = load(tmp_path, task="instance")
    assert single.labels.tolist() == [0, 1] and np.array_equal(single.ignore, sample.ignore)


def test_labelme_splits_labels_and_pictures_elsewhere(tmp_path):
    for number in range(20):
        labelme(tmp_path / f"{number:02}.json")
    write_png(tmp_path / "bare.png", picture(1))
    parts = [open_source(tmp_path, split) for split in ("train", "val")]
    assert [len(part) for part in parts] == [18, 2]
    assert not {part.name(0) for part in parts[:1]} & {parts[1].name(i) for i in range(2)}
    assert any("1 pictures" in note and "bare" in note for note in parts[0].notes)
    (tmp_path / "labels.txt").write_text("__ignore__\n_background_\ndog\ncat\n")
    assert names_of(open_source(tmp_path, "train")) == ["dog", "cat"]
    (tmp_path / "labels.txt").write_text("dog\n")
    with pytest.raises(DataError, match="shape 0 .*is of class 'cat', which is not known.*labels.txt"):
        load(tmp_path)
    (tmp_path / "labels.txt").unlink()
    far = tmp_path / "far"
    labelme(far / "jsons" / "a.json", imagePath="C:\\Users\\me\\pictures\\a.png")
    (far / "pictures").mkdir()
    (far / "jsons" / "a.png").rename(far / "pictures" / "a.png")
    assert np.array_equal(load(far, "val", images=far / "pictures").image, picture(0))
    with pytest.raises(DataError, match="no picture .*a.png, named in .*a.json"):
        load(far, "val")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"shape_type": "linestrip"}, 'it is a "linestrip", and polygon, rectangle and circle are what is read'),
        ({"shape_type": "mask"}, 'it is a "mask", and'),
        ({"shape_type": ["x"]}, r'it is a \["x"\], and'),
        ({"label": ""}, "its class has no name"),
        ({"label": " \t"}, "its class has no name"),
        ({"label": None}, "its class has no name"),
        ({"points": CORNERS[:2]}, "it is a polygon with 2 points"),
        ({"points": CORNERS[:3], "shape_type": "circle"}, "a circle with 3 points"),
        ({"points": CORNERS[:3], "shape_type": "rectangle"}, "a rectangle with 3 points"),
        ({"points": "x"}, "no list of x and y"),
        ({"points": [[1, float("nan")]] * 3}, "no list of x and y"),
        ({"points": [[1, 10**400]] * 3}, "no list of x and y"),
        ({"points": [[True, 1]] * 3}, "no list of x and y"),
        ({"points": [[x + 60, y] for x, y in CORNERS]}, "it lies outside the picture of 60 x 40"),
        ({"points": [[x, y - 30] for x, y in CORNERS]}, "it lies outside the picture of 60 x 40"),
        ({"points": [*CORNERS[:3], [500, 9]]}, "far outside the picture"),
        ({"group_id": [1]}, "its group_id is"),
    ],
)
def test_labelme_shapes_that_cannot_be_used_are_named(tmp_path, shape, message):
    path = labelme(tmp_path / "train" / "a.json", SQUARE, SQUARE | shape)
    (tmp_path / "labels.txt").write_text("cat\n")
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path)
    assert str(caught.value).startswith(f"{path}: shape 1") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"imagePath": "other.png"}, "no picture .*other.png, named in"),
        ({"imagePath": ""}, "has imagePath"),
        ({"imageHeight": 41}, "a.json is 60 x 41, but its picture .*a.png is 60 x 40"),
        ({"imageWidth": None}, "has imageWidth null"),
        ({"shapes": None}, "has no list 'shapes'"),
        ({"shapes": [7]}, "shape 0: it is no object of json"),
    ],
)
def test_labelme_files_that_cannot_be_used_are_named(tmp_path, changes, message):
    labelme(tmp_path / "train" / "b.json")
    path = labelme(tmp_path / "train" / "a.json", **changes)
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_labelme_without_any_object_is_one_line(tmp_path):
    labelme(tmp_path / "train" / "a.json", SQUARE | {"label": ""})
    with pytest.raises(UserError, match="no object in the 1 annotation files of .*a.json: shape 0: its class has no"):
        open_source(tmp_path, "train")
    with pytest.raises(UserError, match="no jsons of labelme for val in"):
        open_source(tmp_path, "val")


def test_check_data_reports_labelme_file_by_file(tmp_path, capsys):
    root = labelme_tree(tmp_path)
    assert run_command(check_data, [str(root)]) == 0
    out = capsys.readouterr().out
    assert "labelme data for instance segmentation, 2 classes" in out and "all of it can be used" in out
    (root / "train" / "1.json").write_text('{"shapes": [')
    (root / "train" / "2.png").unlink()
    (root / "train" / "0.png").write_bytes(b"no picture")
    assert run_command(check_data, [str(root)]) == 1
    out = capsys.readouterr().out
    assert "1.json is not readable as json" in out and "no picture" in out and "0.png" in out and "3 problems" in out


def test_voc_boxes(tmp_path, capsys):
    root = voc(tmp_path, OBJECT + OBJECT.replace(">0<", ">1<").replace("cat", "dog"))
    assert guess(root) == "voc" and tasks_of(root, "voc") == ("instance",)
    with pytest.raises(UserError, match="no SegmentationObject/.*--data.boxes true"):
        open_source(root, "train")
    source = open_source(root, "train", boxes=True)
    assert len(source.vocabulary.classes) == 20 and names_of(source)[7] == "cat" and len(source) == 1
    sample = source.load(0)
    assert np.array_equal(sample.masks, [DRAWN, DRAWN]) and sample.labels.tolist() == [7, 11]
    assert sample.crowd.tolist() == [False, True] and np.array_equal(sample.image, picture(0))
    assert run_command(check_data, [str(root), "--boxes"]) == 0
    assert "boxes are taken for masks" in capsys.readouterr().out
    own = voc(tmp_path / "own", OBJECT.replace("cat", "bolt"))
    assert names_of(open_source(own, "val", boxes=True)) == ["bolt"]


def test_voc_masks(tmp_path, capsys):
    root = voc(tmp_path)
    classes, objects = voc_masks(root)
    source = open_source(root, "train", "semantic")
    assert names_of(source)[:2] == ["background", "aeroplane"] and source.vocabulary.num_classes == 21
    sample = source.load(0)
    assert np.array_equal(sample.ignore, classes == 255) and sample.labels.tolist() == [0, 8, 12]
    assert np.array_equal(sample.masks, [classes == 0, classes == 8, classes == 12])
    source = open_source(root, "val")
    sample = source.load(0)
    assert source.task == "instance" and sample.labels.tolist() == [7, 7, 11]
    assert np.array_equal(sample.masks, [objects == 1, objects == 2, objects == 3])
    assert np.array_equal(sample.ignore, classes == 255) and not sample.crowd.any()
    assert run_command(check_data, [str(root)]) == 0
    classes[0, 0], objects[30, 40] = 77, 1
    write_palette(root / "SegmentationClass" / "a.png", classes)
    for task in ("semantic", "instance"):
        with pytest.raises(DataError, match=r"a.png has ids outside the .* classes: 77 \(1 pixels\); name the classes"):
            load(root, task=task)
    assert run_command(check_data, [str(root)]) == 1
    (root / "labels.txt").write_text("_background_\n" + "\n".join(f"c{i}" for i in range(1, 78)))
    write_palette(root / "SegmentationObject" / "a.png", objects)
    sample = load(root)
    assert sample.labels.tolist() == [7, 7, 11] and sample.ignore[30, 40] and not sample.masks[:, 30, 40].any()
    (root / "SegmentationObject" / "a.png").unlink()
    with pytest.raises(DataError, match="no mask .*SegmentationObject/a.png"):
        load(root)


def test_voc_masks_in_folders_and_names_of_nothing(tmp_path):
    root = voc(tmp_path)
    voc_masks(root)
    wanted = open_source(root, "val").load(0)
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationObject"):
        (root / folder / "deep").mkdir()
        for path in (root / folder).glob("a.*"):
            path.rename(root / folder / "deep" / path.name)
    lists = [path for path in (root / "ImageSets").rglob("val.txt")]
    for path in lists:
        path.write_text("deep/a\n<x/>\n../../a\n")
    source = open_source(root, "val")
    assert np.array_equal(source.load(0).masks, wanted.masks)
    for index in (1, 2):
        with pytest.raises(DataError, match="no picture .*JPEGImages"):
            source.load(index)


def test_voc_without_lists_holds_every_tenth_out(tmp_path):
    root = voc(tmp_path, names=("a", "b"))
    for path in (root / "ImageSets" / "Main").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="no list .*ImageSets/Main/train.txt"):
        open_source(root, "train", boxes=True)
    (root / "ImageSets" / "Main").rmdir()
    (root / "ImageSets").rmdir()
    names = [[s.name(i) for i in range(len(s))] for s in (open_source(root, x, boxes=True) for x in ("train", "val"))]
    assert names == [["a"], ["b"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"before": BOMB}, "defines a document type or entities, which is refused"),
        ({"before": '<!DOCTYPE a SYSTEM "file:///etc/passwd">'}, "defines a document type"),
        ({"xml": "<object>"}, "is not readable as xml: mismatched tag"),
        ({"before": '<?xml version="1.0" encoding="none-such"?>'}, "is not readable as xml"),
        ({"size": (41, 60)}, "a.xml is 60 x 41, but its picture .*a.png is 60 x 40"),
        ({"size": ("", 60)}, "its size: size/height is '', not a number"),
        ({"xml": f"<object><name> </name>{BOX}</object>"}, "object 1: its class has no name"),
        ({"xml": f"<object>{BOX}</object>"}, "object 1: its class has no name"),
        ({"xml": "<object><name>cat</name></object>"}, r"object 1 \(cat\): bndbox/xmin is missing"),
        ({"xml": OBJECT.replace(">11<", ">nan<")}, "bndbox/xmin is 'nan', not a number"),
        ({"xml": OBJECT.replace(">11<", ">41<")}, "its box ends before it begins"),
        ({"xml": OBJECT.replace(">11<", ">61<").replace(">30<", ">70<")}, "it lies outside the picture of 60 x 40"),
        ({"xml": OBJECT.replace(">30<", ">999<")}, "far outside the picture"),
        ({"xml": OBJECT.replace(">0<", ">maybe<")}, "difficult is 'maybe'"),
    ],
)
def test_voc_files_that_cannot_be_used_are_named(tmp_path, options, message):
    root = voc(tmp_path, **options)
    (root / "labels.txt").write_text("cat\n")
    with pytest.raises(DataError, match=message) as caught:
        load(root, boxes=True)
    assert str(root / "Annotations" / "a.xml") in str(caught.value) and "\n" not in str(caught.value)


def test_voc_files_missing_or_too_large(tmp_path, monkeypatch):
    root = voc(tmp_path)
    (root / "labels.txt").write_text("cat\n")
    (root / "JPEGImages" / "a.png").unlink()
    with pytest.raises(DataError, match="no picture .*a.jpg, named in .*a.xml"):
        load(root, boxes=True)
    monkeypatch.setattr("train.data.voc.MOST_XML", 100)
    with pytest.raises(DataError, match="a.xml is not readable as xml: it has more than 100 bytes"):
        load(root, boxes=True)
    (root / "Annotations" / "a.xml").unlink()
    with pytest.raises(DataError, match="no annotation file .*a.xml"):
        load(root, boxes=True)
    monkeypatch.setattr("train.data.labelme.MOST_JSON", 100)
    labelme(tmp_path / "other" / "train" / "a.json")
    (tmp_path / "other" / "labels.txt").write_text("cat\n")
    with pytest.raises(DataError, match="a.json has more than 100 bytes"):
        load(tmp_path / "other", kind="labelme")


@pytest.mark.parametrize("kind", ["labelme", "voc"])
def test_they_train_and_each_class_is_scored(tmp_path, kind):
    root = labelme_tree(tmp_path / "data") if kind == "labelme" else voc(tmp_path / "data")
    options = [
        "--data",
        root,
        "--data.workers",
        1,
        "--data.boxes",
        "true",
        "--run.total_batch",
        2,
        "--run.batch_size",
        2,
    ]
    options += ["--schedule.max_steps", 2, "--run.eval_every", 2, "--data.resize", "none"]
    run = fit(tmp_path / "run", *options, "--data.task", "instance", "--evaluator.tasks", "[instance]")
    assert "AP" in run.last["per_class"]["cat"] and run.last["bad_images"] == 0
    if kind == "voc":
        voc_masks(root)
    run = fit(tmp_path / "other", *options, "--data.task", "semantic", "--evaluator.tasks", "[semantic]")
    assert "IoU" in run.last["per_class"]["cat"] and "IoU" in run.last["per_class"]["background"]
    assert run.last["images"] == 1
