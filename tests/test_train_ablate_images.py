"""Ablations on images from disk: held in memory unchanged, tabulated wherever the data are; tokens on each object."""

import csv
import pickle

import numpy as np
import pytest
import torch

from benchmarks import rival, tokens
from train import ablate
from train.ablation.rows import Config
from train.ablation.table import read_runs
from train.common.errors import UserError
from train.config.loader import load_config
from train.data.cached_source import CachedSource
from train.data.formats import open_source
from train.engine.optimizer import build_optimizer
from train.models.segmenter import build_model

from . import seg_trees as trees

SMALL = [40, 20, 44, 20, 44, 24, 40, 24]  # 4 x 4 pixels, in the box of one cell where pixels are taken twice as large
TINY = (
    "--data.test_short=80", "--schedule.max_steps=1", "--schedule.warmup_steps=0", "--run.total_batch=2",
    "--run.batch_size=2", "--model.overrides.num_queries=4", "--evaluator.areas=[100,300]",
)  # fmt: skip


@pytest.fixture
def data(tmp_path):
    """Two pictures of 40 x 60 pixels to train and as many to validate, with a square and a small one in each."""
    annotations = [(i, 3, [outline], 0) for i in (0, 1) for outline in (trees.SQUARE, SMALL)]
    for split in ("train", "val"):
        trees.instances(tmp_path / "data", annotations, split=split)
    return tmp_path / "data"


def test_held_pictures_are_the_same(data):
    source = open_source(data, "train")
    held = pickle.loads(pickle.dumps(CachedSource(source)))
    for _ in range(2):
        for index in range(2):
            ours, theirs = held.load(index, 1), source.load(index)
            assert all(np.array_equal(getattr(ours, name), getattr(theirs, name)) for name in vars(theirs))
    assert len(held) == 2 and held.vocabulary == source.vocabulary


def test_an_ablation_of_images_and_its_tokens(data, tmp_path, capsys):
    path = tmp_path / "t.csv"
    arguments = ["--config", "nuclei", "--data", str(data), *TINY]
    assert ablate.main([*arguments, "--rows", "gridded", "--seeds", "0", "--out", str(path)]) == 0
    (run,) = read_runs(path).values()
    assert run["AP_small"] is not None and all(run[f"focus_{merge}"] >= 0 for merge in (1, 2))
    text = path.with_suffix(".md").read_text()
    assert "--data PATH --data.test_short=80" in text and str(data) not in text
    assert "2 pictures for the segmenter; all validation pictures" in text
    elsewhere, here = (load_config("nuclei", ["--data", at, *TINY], Config) for at in ("elsewhere", str(data)))
    assert ablate.settings_of(elsewhere, "gridded") == ablate.settings_of(here, "gridded") == run["settings"]

    assert tokens.main([str(path), *arguments, "--out", str(tmp_path / "tokens_t.csv")]) == 0
    lines = {line["area"]: line for line in csv.DictReader((tmp_path / "tokens_t.csv").read_text().splitlines())}
    assert {area: line["objects"] for area, line in lines.items()} == {"all": "4", "small": "2", "large": "2"}
    # twice as large, the squares span 40 x 40 pixels from (20, 10) and 8 x 8 from (80, 40)
    assert float(lines["large"]["cells"]) == 100 and float(lines["small"]["cells"]) == 4
    assert float(lines["large"]["tokens_1"]) == 25 and float(lines["small"]["tokens_1"]) == 1
    assert "| gridded | 1 | large (2) | 100.0 | 25.00 /" in capsys.readouterr().out
    same = [
        "--model.overrides.num_queries=4",
        *TINY[:1],
        "--evaluator.tile=64",
        "--evaluator.tile_overlap=16",
        TINY[-1],
    ]
    weights, out = str(tmp_path / "t" / "gridded_0" / "segment" / "last.pt"), tmp_path / "one.csv"
    assert tokens.main([weights, "--config", "nuclei_nano", "--data", str(data), *same, "--out", str(out)]) == 0
    both = list(csv.DictReader(out.read_text().splitlines()))
    assert [line["row"] for line in both] == ["last"] * 3 + ["gridded"] * 3
    grid = {line["area"]: line for line in both if line["row"] == "gridded"}
    assert all(grid[area]["tokens_2"] == lines[area]["tokens_2"] for area in lines)


def test_what_only_digits_have_is_refused_elsewhere(data):
    with pytest.raises(UserError, match="one_class and table.classify are for Scattered Digits"):
        ablate.main(["--config", "nuclei", "--data", str(data), "--table.one_class", "true"])


def test_the_rival_is_as_large_as_ours_and_speaks_as_ours_does(data):
    pytest.importorskip("transformers")
    config = load_config("nuclei", ["--data", str(data)], Config)
    config.model.num_classes = 1
    network, ours = rival.SwinSegmenter(config.model), build_model(config)
    sizes = [sum(each.numel() for each in model.parameters()) for model in (network, ours)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)
    images = torch.randn(2, 3, 64, 64)
    for output in (network(images), ours(images)):
        assert output.class_queries_logits.shape == (2, 25, 2) and output.masks_queries_logits.shape == (2, 25, 16, 16)
        assert len(output.auxiliary_logits) == config.model.overrides["decoder_layers"]
    groups = build_optimizer(network, config).param_groups
    free = {id(each) for group in groups if not group["weight_decay"] for each in group["params"]}
    tables = [each for name, each in network.named_parameters() if name.endswith("position_bias_table")]
    assert tables and all(id(each) in free for each in tables)


def test_the_rival_adds_to_no_other_table(data, tmp_path, capsys):
    other = tmp_path / "mine.csv"
    other.write_text("name,phone\nA,1\n")
    with pytest.raises(UserError, match="mine.csv is no table of benchmarks.rival: name another file by --out"):
        rival.main(["--config", "nuclei", "--data", str(data), "--out", str(other)])
    assert other.read_text() == "name,phone\nA,1\n"
