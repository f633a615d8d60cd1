"""From masks to predictions at the picture's size, pictures and JSON files of them, and the demonstration."""

import ctypes
import json
from contextlib import nullcontext, suppress

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import fast
import fast.postprocess
from benchmarks import measure
from tests.seg_train_cases import KIND, config_of, model_of
from tests.seg_trees import picture
from train import demo, predict
from train.common.errors import UserError, run_command
from train.common.output_files import MANIFEST
from train.config.loader import load_config
from train.config.segmentation import Evaluator
from train.data.digits_segmentation import vocabulary
from train.data.masks import box, decode, encode
from train.data.segmentation import known_vocabulary, pack_vocabulary, unpack_vocabulary
from train.data.segmentation_transforms import EvalTransform
from train.inference import segmentation as inference
from train.inference.predictions import check
from train.inference.segmentation import Enlarger, find_instances, find_segments, semantic_labels
from train.metrics.focus_ratio import is_inside
from train.models.checkpoint import write_file
from train.visualization.segments import count_of, draw_segments, middle

THINGS = frozenset(range(3))


def outputs(seed=0, queries=12, classes=5, grid=(9, 14)):
    """Draw smooth mask logits (q, h, w) and class logits (q, classes + 1), some sure of a class."""
    generator = torch.Generator().manual_seed(seed)
    masks = fast.postprocess.resize_bilinear(6 * torch.randn(queries, 3, 4, generator=generator), grid)
    return 4 * torch.randn(queries, classes + 1, generator=generator), masks


@pytest.fixture(params=[1, 1 << 23], ids=["one_at_a_time", "all_at_once"])
def enlarge(request, monkeypatch):
    monkeypatch.setattr(inference, "AT_ONCE", request.param)
    return Enlarger((9, 14), (33, 55), (50, 83))


def test_padding_is_cut_before_the_last_resize(enlarge):
    _, masks = outputs()
    padded = fast.postprocess.resize_bilinear(masks, (36, 56))
    assert torch.equal(enlarge(masks), fast.postprocess.resize_bilinear(padded[:, :33, :55], (50, 83)))
    assert enlarge.to_original(torch.zeros(2, 50, 83)).shape == (2, 50, 83)


@pytest.mark.parametrize("inner", [(33, 55), (36, 56), (1, 1)])
@pytest.mark.parametrize("outer", [(33, 55), (50, 83), (7, 9), (1, 200)])
def test_rows_are_those_of_the_whole(inner, outer):
    enlarge, (_, masks) = Enlarger((9, 14), inner, outer), outputs()
    whole = enlarge(masks)
    for first, last in [(0, 1), (0, outer[0]), (outer[0] // 2, outer[0]), (outer[0] - 1, outer[0])]:
        found = enlarge.rows(lambda a, b: enlarge.input_rows(masks, a, b), first, last)
        assert torch.allclose(found, whole[:, first:last], atol=1e-5)
    high = enlarge.to_input(masks)
    assert all(torch.equal(enlarge.input_rows(masks, i, i + 1), high[:, i : i + 1]) for i in range(inner[0]))


@pytest.mark.parametrize("seed", range(3))
def test_semantic_is_the_common_one(enlarge, seed):
    classes, masks = outputs(seed)
    scores = fast.postprocess.semantic(classes, enlarge.to_input(masks))
    expected = fast.postprocess.resize_bilinear(scores, (50, 83)).argmax(0)
    assert (semantic_labels(classes, masks, enlarge) == expected.numpy()).mean() > 0.999  # sums in another order


@pytest.mark.parametrize("seed", range(3))
def test_instances_are_the_common_ones(enlarge, seed):
    classes, masks = outputs(seed)
    scores, labels, shapes = fast.postprocess.instances(classes, enlarge(masks), 20)
    kept = [i for i, label in enumerate(labels.tolist()) if label in THINGS]
    found = find_instances(classes, masks, enlarge, THINGS, 20)
    assert [each.label for each in found] == labels[kept].tolist() and 0 < len(found) < 20
    assert [each.score for each in found] == pytest.approx(scores[kept].tolist(), rel=1e-5)
    assert all(np.array_equal(decode(each.rle), shapes[i].numpy()) for each, i in zip(found, kept, strict=True))


@pytest.mark.parametrize("seed", range(6))
def test_panoptic_is_the_common_one(enlarge, seed):
    classes, masks = outputs(seed)
    rules = Evaluator(object_threshold=0.5, overlap_threshold=0.4)
    expected, segments = fast.postprocess.panoptic(classes, enlarge(masks), THINGS, 0.5, 0.4)
    found = find_segments(classes, masks, enlarge, THINGS, rules)
    assert np.array_equal(found.map, expected.numpy()) and found.segments == segments
    check("panoptic", found, "a", (50, 83), 5)


def test_nothing_is_sure_enough_to_be_a_segment(enlarge):
    classes, masks = outputs()
    found = find_segments(classes, masks, enlarge, THINGS, Evaluator(object_threshold=1))
    assert not found.map.any() and found.segments == []


def test_big_pictures_are_enlarged_a_few_masks_at_a_time():
    enlarge = Enlarger((256, 512), (1024, 2048), (1024, 2048))
    assert [len(part) for part in enlarge.parts(torch.arange(10))] == [4, 4, 2]
    assert Enlarger((64, 64), (256, 256), (9000, 9000)).count == 1


def peak_of(task, queries, classes):
    """Return the mebibytes that a picture of a megapixel adds to a process's peak, everywhere seen by all queries."""
    generator, rules = torch.Generator().manual_seed(0), Evaluator(object_threshold=0, overlap_threshold=0, top=queries)
    masks = fast.postprocess.resize_bilinear(6 * torch.randn(queries, 9, 9, generator=generator), (250, 250))
    logits = torch.randn(queries, classes + 1, generator=generator)
    makers = {
        "semantic": lambda large: semantic_labels(logits, masks, large),
        "instance": lambda large: find_instances(logits, masks, large, range(classes), queries),
        "panoptic": lambda large: find_segments(logits, masks, large, range(classes), rules),
    }
    with suppress(
        AttributeError
    ):  # of glibc: blocks above 64 KiB go back when they are freed, whatever was freed before
        ctypes.CDLL(None).mallopt(-3, 1 << 16)
    makers[task](Enlarger((250, 250), (8, 8), (8, 8)))  # what torch loads at first does not count
    before = measure.resident_peak()
    makers[task](Enlarger((250, 250), (990, 990), (1000, 1000)))
    return measure.resident_peak() - before


@pytest.mark.parametrize(
    ("task", "queries", "classes"), [("semantic", 20, 600), ("instance", 300, 5), ("panoptic", 300, 5)]
)
def test_memory_is_bounded_by_the_picture(task, queries, classes):
    """One map of float32 has 4 MiB; all queries' would have 1200, all classes' 2400."""
    assert measure.in_own_process(peak_of, task, queries, classes) < 200


def test_what_the_network_sees_at_once_is_bounded():
    prepared = EvalTransform()(np.zeros((4, 3_000_000, 3), dtype=np.uint8))
    with pytest.raises(
        UserError, match="would see 3,000,000 x 32 pixels at once, more than 8,388,608: pass --evaluator.tile 1024"
    ):
        inference.predict(None, prepared, (4, 3_000_000), ["semantic"], None, Evaluator(), nullcontext())


def test_outlines_of_large_pictures_are_drawn_small():
    large, mask = np.zeros((90, 3000, 3), dtype=np.uint8), np.zeros((90, 3000), dtype=bool)
    mask[30:60, 900:1500] = True
    segment = {"id": 1, "name": "x", "score": None, "color": (255, 0, 0), "area": 18000, "segmentation": encode(mask)}
    axes = Figure().subplots()
    draw_segments(axes, large, [segment])
    drawn = axes.images[0].get_array()
    assert drawn.shape == (30, 1000, 3)
    expected = np.zeros((30, 1000, 3))
    expected[10:20, 300:500, 0] = 128
    assert np.array_equal(drawn, expected)
    (outline,) = [each.vertices for each in axes.collections[0].get_paths()]
    assert outline.min(axis=0).tolist() == [299.5, 9.5] and outline.max(axis=0).tolist() == [499.5, 19.5]
    assert [text.get_position() for text in axes.texts] == [(399, 14)]


def test_names_stay_inside_the_picture_and_one_class_is_named_once():
    masks = np.zeros((2, 100, 100), dtype=bool)
    masks[0, :6, :6] = masks[1, 40:60, 94:] = True
    segments = [
        {"id": i, "name": "cell", "score": 0.9, "color": None, "area": int(m.sum()), "segmentation": encode(m)}
        for i, m in enumerate(masks, 1)
    ]
    axes = Figure().subplots()
    draw_segments(axes, np.zeros((100, 100, 3), dtype=np.uint8), segments)
    assert [(t.get_text(), t.get_ha(), t.get_va()) for t in axes.texts] == [
        ("90", "left", "top"),
        ("90", "right", "center"),
    ]
    assert count_of(segments) == "2 segments: cell" and count_of([]) == "0 segments"
    axes = Figure().subplots()
    draw_segments(axes, np.zeros((100, 100, 3), dtype=np.uint8), [segments[0], segments[1] | {"name": "dust"}])
    assert [text.get_text() for text in axes.texts] == ["cell 90", "dust 90"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Write a checkpoint of an untrained segmenter that finds something everywhere."""
    config = config_of(
        "--model.num_classes", 16, "--evaluator.object_threshold", 0.0, "--evaluator.overlap_threshold", 0.0
    )
    model = model_of()
    with torch.no_grad():
        model.decoder.class_head.bias[-1] = -5
    facts = {"task": "panoptic", "vocabulary": pack_vocabulary(vocabulary("panoptic"))}
    path = tmp_path_factory.mktemp("weights") / "best.pt"
    state = {"kind": KIND, "config": config.model_dump(mode="json"), "model": model.state_dict(), "ema": None}
    write_file(path, state | facts)
    return str(path)


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_predict_writes_pictures_and_json(tmp_path, weights, task, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    (folder / "deep").mkdir(parents=True)
    Image.fromarray(picture(1, (40, 70))).save(folder / "a.png")
    Image.fromarray(picture(2, (40, 70))).convert("L").save(folder / "a.jpg")
    Image.fromarray(picture(3, (70, 40))).convert("CMYK").save(folder / "deep" / "b.tif")
    (folder / "bad.png").write_bytes(b"no picture")
    arguments = [str(folder), "--checkpoint", weights, "--task", task, "--out", str(out), "--least", "0"]
    assert predict.main(arguments) == 1
    captured = capsys.readouterr()
    assert "skipped cannot read picture" in captured.err and "bad.png" in captured.err
    assert "3 pictures" in captured.out and "1 unreadable" in captured.out
    written = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*"))
    assert written.pop(0) == MANIFEST
    assert written == ["a.jpg.json", "a.jpg.png", "a.png.json", "a.png.png", "deep/b.json", "deep/b.png"]
    result = json.loads((out / "deep" / "b.json").read_text())
    assert result["size"] == [70, 40] and result["task"] == task and result["segments"]
    for each in result["segments"]:
        mask = decode(each["segmentation"])
        assert mask.shape == (70, 40) and mask.sum() == each["area"] > 0 and each["box"] == box(mask)
        assert each["name"] == vocabulary("panoptic").classes[each["label"]].name
        assert (each["score"] is None) == (task == "semantic")
    with Image.open(out / "deep" / "b.png") as drawing:
        assert min(drawing.size) > 400


def test_a_slender_picture_is_segmented(tmp_path, weights):
    Image.fromarray(picture(0, (1, 500))).save(tmp_path / "slender.png")
    assert predict.main([str(tmp_path / "slender.png"), "--checkpoint", weights, "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "slender.json").read_text())["size"] == [1, 500]


def test_official_weights_predict_with_the_data_s_names(tmp_path, weights):
    state = torch.load(weights, weights_only=True)["model"]
    torch.save({"model": fast.checkpoints.to_official(state)}, tmp_path / "official.pth")
    predictor = predict.open_predictor(None, "digits_panoptic_smoke", str(tmp_path / "official.pth"))
    assert predictor.task == "panoptic" and predictor.vocabulary.classes[12].name == "mineral"
    found, stages, inner = predictor(picture(0, (40, 70)), "semantic")
    assert found.shape == inner == (40, 70) and [len(stage["positions"]) for stage in stages] == [180, 45, 11, 2]


def test_classes_are_known_without_data():
    assert known_vocabulary(config_of(name="cityscapes_panoptic_mini")).classes[-1].name == "bicycle"
    numbered = known_vocabulary(config_of(name="coco_instance_mini"))
    assert len(numbered.things) == numbered.num_classes == 80 and numbered.classes[0].name == "class 1"
    assert unpack_vocabulary(pack_vocabulary(vocabulary("instance"))) == vocabulary("instance")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jpg", "--checkpoint", "x.pt"], "no picture or folder nowhere.jpg"),
        (["{}", "--checkpoint", "x.pt"], "no checkpoint x.pt"),
        (["{}", "--checkpoint", "a", "--official", "b"], "not both"),
        (["{}"], "name the weights"),
        (["{}", "--checkpoint", "{}"], "truncated or corrupted"),
        (["{}", "--checkpoint", "{}", "--task", "boxes"], "invalid choice: 'boxes'"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(tmp_path, capsys, arguments, message):
    path = tmp_path / "a.png"
    Image.fromarray(picture(0)).save(path)
    with pytest.raises(UserError, match=message):
        predict.main([each.format(path) for each in arguments])
    assert run_command(predict.main, [each.format(path) for each in arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_boxes_are_tight_and_names_lie_inside():
    mask = np.zeros((9, 12), dtype=bool)
    mask[2:7, 3:11] = True
    mask[3:6, 4:10] = False
    x, y = middle(mask)
    assert box(mask) == [3, 2, 8, 5] and mask[y, x]


def test_focus_counts_cells_in_any_box():
    cells = torch.cartesian_prod(torch.arange(8), torch.arange(8))
    boxes = [(0, 0, 8, 8), (4, 4, 16, 8), (24, 24, 32, 32)]
    inside = torch.stack([is_inside(cells, one) for one in boxes]).any(0)
    assert torch.equal(is_inside(cells, boxes), inside) and inside.sum() == 10


def test_demo_reports_beside_the_untrained_and_fails_below_enough(tmp_path, capsys):
    options = ["--config", "digits_panoptic_smoke", "--run.output", str(tmp_path), "--schedule.max_steps", "2"]
    backbone = ["--backbone", "digits_smoke", "--data.val_length", "2"]
    assert demo.main([*options, *backbone]) == 1
    text, report = capsys.readouterr().out, json.loads((tmp_path / "demo.json").read_text())
    assert "untrained" in text and "NOT reached" in text and "focus ratio" in text and "background 0.2" in text
    assert report["scores"].keys() == report["untrained"]["scores"].keys() >= {"PQ", "AP", "AP_small"}
    assert len(report["focus_ratio"]) == 3 and report["training_pictures"] == 8
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size[0] > 1000
    assert fast.checkpoints.load(tmp_path / "backbone" / "last.pt")["epoch"] == 2 and report["backbone_pictures"] == 128


def test_demo_trains_its_backbone_on_pictures_like_its_own():
    first, second = load_config("digits_backbone", []), config_of(name="digits_panoptic_nano")
    several = second.data.digits.pop("digits")
    assert first.data.digits == second.data.digits and several[1] > 1


def test_prepared_pictures_give_back_their_own_size():
    prepared = EvalTransform(64, 100)(picture(0, (30, 90)))
    model = model_of().eval()
    found = inference.predict(
        model,
        prepared,
        (30, 90),
        ["semantic", "instance", "panoptic"],
        vocabulary("panoptic"),
        Evaluator(),
        nullcontext(),
    )
    for task, prediction in found.items():
        check(task, prediction, "a", (30, 90), 16)
