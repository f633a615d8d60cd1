"""Results written to disk are read back by the official tools, whose scores are ours."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as instance_evaluation
from cityscapesscripts.evaluation import evalPanopticSemanticLabeling as panoptic_evaluation
from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as pixel_evaluation
from cityscapesscripts.preparation.createPanopticImgs import convert2panoptic
from PIL import Image
from pycocotools import mask as coco_mask
from torchmetrics.detection import PanopticQuality

from tests.seg_eval_cases import CITY, TOY, box, city_ids, city_sample, instances, panoptic, sample, shaken
from train.data.sample import ClassInfo, Vocabulary
from train.metrics.cityscapes import CityscapesInstanceEvaluator, CityscapesPanopticEvaluator
from train.metrics.coco import InstanceEvaluator, score_files
from train.metrics.panoptic import PanopticEvaluator
from train.metrics.semantic import SemanticEvaluator
from train.metrics.submission import create_writer

SEEDS = range(6)


def city_name(seed):
    return f"town_{seed:06d}_000019"


@pytest.fixture
def city_target(tmp_path, monkeypatch):
    """Official ground truth of six random pictures.

    cityscapesscripts 2.3.0 uses np.in1d, which NumPy 2.4 has no more, and dumps NumPy's numbers as json, which fails.
    """
    folder = tmp_path / "gtFine" / "val" / "town"
    folder.mkdir(parents=True)
    for seed in SEEDS:
        ids = city_ids(seed)
        Image.fromarray(ids.astype(np.uint16)).save(folder / f"{city_name(seed)}_gtFine_instanceIds.png")
        labels = np.where(ids < 1000, ids, ids // 1000).astype(np.uint8)
        Image.fromarray(labels).save(folder / f"{city_name(seed)}_gtFine_labelIds.png")
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)
    monkeypatch.setattr(instance_evaluation, "writeDict2JSON", lambda *_: None)
    return folder


def settings(evaluator, monkeypatch, **values):
    for name, value in {"quiet": True, "JSONOutput": False, **values}.items():
        monkeypatch.setattr(evaluator.args, name, value)
    return evaluator.args


def test_cityscapes_instances(city_target, tmp_path, monkeypatch):
    ours, writer = CityscapesInstanceEvaluator(CITY), create_writer("instance", tmp_path / "results", CITY)
    for seed in SEEDS:
        target = city_sample(city_ids(seed), city_name(seed), "instance")
        masks, labels = shaken(target, seed)
        scores = np.random.default_rng(seed).integers(1, 9, len(labels)) / 10  # with ties
        found = instances(masks, labels, scores.tolist())
        ours.update(target, found)
        writer.add(target.name, found)
    writer.close()
    options = settings(
        instance_evaluation,
        monkeypatch,
        gtInstancesFile=str(tmp_path / "gt.json"),
        predictionPath=str(tmp_path / "results"),
    )
    targets = [str(city_target / f"{city_name(seed)}_gtFine_instanceIds.png") for seed in SEEDS]
    predictions = [instance_evaluation.getPrediction(path, options) for path in targets]
    official = instance_evaluation.evaluateImgLists(predictions, targets, options)["averages"]
    result = ours.compute()
    assert 10 < result["AP"] < 90
    assert result["AP"] == pytest.approx(100 * official["allAp"], abs=1e-9)
    assert result["AP50"] == pytest.approx(100 * official["allAp50%"], abs=1e-9)
    assert result["per_class"]["car"]["AP"] == pytest.approx(100 * official["classes"]["car"]["ap"], abs=1e-9)


def official_panoptic(target_json, found_json):
    """Run the official count over two files in COCO's panoptic format."""
    target, found = json.loads(target_json.read_text()), json.loads(found_json.read_text())
    by_id = {each["image_id"]: each for each in found["annotations"]}
    pairs = [(each, by_id[each["image_id"]]) for each in target["annotations"]]
    categories = {each["id"]: each for each in target["categories"]}
    folders = target_json.with_suffix(""), found_json.with_suffix("")
    with contextlib.redirect_stdout(io.StringIO()):
        return panoptic_evaluation.average_pq(
            panoptic_evaluation.pq_compute_single_core(0, pairs, *folders, categories), categories
        )


@pytest.mark.parametrize("evaluator", [CityscapesPanopticEvaluator, PanopticEvaluator])
def test_cityscapes_panoptic(city_target, tmp_path, evaluator):
    """With groups and void; our own count of COCO's rules gives the same as the official one."""
    ours, writer = evaluator(CITY), create_writer("panoptic", tmp_path / "results", CITY)
    for seed in SEEDS:
        target = city_sample(city_ids(seed), city_name(seed), "panoptic")
        found = panoptic(*shaken(target, seed), CITY, target.ignore.shape)
        ours.update(target, found)
        writer.add(target.name, found)
    writer.close()
    with contextlib.redirect_stdout(io.StringIO()):
        convert2panoptic(str(tmp_path / "gtFine"), setNames=["val"])
    official = official_panoptic(tmp_path / "gtFine" / "cityscapes_panoptic_val.json", writer.path)
    result = ours.compute()
    assert 10 < result["PQ"] < 90
    for part, suffix in (("All", ""), ("Things", "_things"), ("Stuff", "_stuff")):
        for name in ("pq", "sq", "rq"):
            assert result[name.upper() + suffix] == pytest.approx(100 * official[part][name], abs=1e-9)


def test_cityscapes_semantic(city_target, tmp_path, monkeypatch):
    ours, writer = SemanticEvaluator(CITY), create_writer("semantic", tmp_path / "results", CITY)
    for seed in SEEDS:
        target = city_sample(city_ids(seed), city_name(seed), "semantic")
        found = np.zeros(target.ignore.shape, dtype=np.int64)
        for mask, label in zip(*shaken(target, seed), strict=True):
            found[mask] = label
        ours.update(target, found)
        writer.add(target.name, found)
    writer.close()
    options = settings(
        pixel_evaluation, monkeypatch, evalInstLevelScore=False, predictionPath=str(tmp_path / "results")
    )
    targets = [str(city_target / f"{city_name(seed)}_gtFine_labelIds.png") for seed in SEEDS]
    with contextlib.redirect_stdout(io.StringIO()):
        found = [pixel_evaluation.getPrediction(options, path) for path in targets]
        official = pixel_evaluation.evaluateImgLists(found, targets, options)
    assert ours.compute()["mIoU"] == pytest.approx(100 * official["averageScoreClasses"], abs=1e-9)


def test_coco_instances(tmp_path):
    """COCO's own annotation file and our results file give the scores of the running evaluator."""
    ours, writer = InstanceEvaluator(TOY), create_writer("instance", tmp_path, TOY)
    images, annotations = [], []
    for seed in SEEDS:
        masks = [box(1, 1 + seed, 9, 8), box(8, 12, 10, 9), box(0, 20, 8, 10)]
        target = sample(masks, [0, 1, seed % 2], f"{(7 * seed) % 11:012d}", crowd=[False, False, seed == 3])
        moved, labels = shaken(target, seed)
        found = instances(moved, labels, [(seed * 5 + 3 * k) % 4 / 4 for k in range(len(labels))])  # with ties
        ours.update(target, found)
        writer.add(target.name, found)
        images.append({"id": int(target.name), "height": 20, "width": 30})
        for mask, label, crowd in zip(masks, target.labels, target.crowd, strict=True):
            rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
            rle["counts"] = rle["counts"].decode()
            entry = {"id": len(annotations) + 1, "image_id": int(target.name), "category_id": TOY.classes[label].id}
            annotations.append({**entry, "segmentation": rle, "area": int(mask.sum()), "iscrowd": int(crowd)})
    writer.close()
    categories = [{"id": each.id, "name": each.name} for each in TOY.classes if each.is_thing]
    content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "target.json").write_text(json.dumps(content))
    official = score_files(tmp_path / "target.json", writer.path)
    np.testing.assert_equal(ours.compute(), official)
    assert 5 < official["AP"] < 95


def test_coco_panoptic_against_torchmetrics():
    """Without crowds, on predictions that cover everything, torchmetrics counts by the same rules."""
    ours = PanopticEvaluator(TOY)
    theirs = PanopticQuality(things={0, 1}, stuffs={2}, return_sq_and_rq=True, allow_unknown_preds_category=True)
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        masks = [~box(0, 0, 20, 30, (20, 30)) | True] + [
            box(*rng.integers(0, 14, 2), *rng.integers(4, 12, 2)) for _ in "12345"
        ]
        labels = [2, *rng.integers(0, 2, 5).tolist()]
        target_map, found = panoptic(masks, labels), panoptic(*_moved(masks, labels, rng))
        visible = [target_map.map == segment.id for segment in target_map.segments]
        ours.update(sample(visible, [segment.label for segment in target_map.segments], str(seed)), found)
        theirs.update(_coloured(found), _coloured(target_map))
    result = ours.compute()
    expected = 100 * theirs.compute().numpy()
    assert 5 < result["PQ"] < 95
    assert [result["PQ"], result["SQ"], result["RQ"]] == pytest.approx(expected, abs=1e-4)


def _moved(masks, labels, rng):
    """The first mask as it is, the others shifted by up to two pixels."""
    return [masks[0]] + [np.roll(mask, rng.integers(-2, 3, 2), (0, 1)) for mask in masks[1:]], labels


def _coloured(result):
    """A panoptic result as torchmetrics wants it: (1, H, W, 2) of class and number."""
    label_of = np.array([-1, *(0 for _ in range(result.map.max()))])
    for segment in result.segments:
        label_of[segment.id] = segment.label
    return torch.from_numpy(np.stack([label_of[result.map], result.map], -1))[None]


def test_ade20k_pictures(tmp_path):
    """Label 0 is written as 1, label 149 as 150."""
    vocabulary = Vocabulary(tuple(ClassInfo(f"class {k}", k + 1, False, None) for k in range(150)), "ade20k")
    writer = create_writer("semantic", tmp_path, vocabulary)
    labels = np.arange(150, dtype=np.int64).reshape(10, 15)
    writer.add("ADE_val_00000001", labels)
    writer.close()
    with Image.open(tmp_path / "ADE_val_00000001.png") as picture:
        assert picture.mode == "L"
        np.testing.assert_array_equal(np.asarray(picture), labels + 1)


def test_coco_panoptic_files(tmp_path):
    """Ids above 255 keep their colours; the json names file, image and classes in COCO's numbers."""
    found = panoptic([box(0, 0, 5, 5), box(6, 6, 5, 5)], [0, 2])
    found.map[found.map == 2] = 70000
    found.segments[1] = found.segments[1]._replace(id=70000)
    writer = create_writer("panoptic", tmp_path, TOY)
    writer.add("000000000139", found)
    writer.close()
    written = json.loads(writer.path.read_text())["annotations"][0]
    assert (written["image_id"], written["file_name"]) == (139, "000000000139.png")
    assert written["segments_info"] == [{"id": 1, "category_id": 1}, {"id": 70000, "category_id": 9}]
    with Image.open(tmp_path / "panoptic_val_results" / written["file_name"]) as picture:
        np.testing.assert_array_equal(panoptic_evaluation.rgb2id(np.asarray(picture)), found.map)
