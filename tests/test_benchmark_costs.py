"""Operations counted are those worked out by hand, and the picture of AP over cost is drawn from a table's runs."""

import pytest
import torch

import fast
from benchmarks import areas, cost
from benchmarks.flops import attention_flop, count_flops, merge_flop
from fast.neighborhoods import stage_geometry
from fast.patch_embedding import grid_positions
from train.ablation.table import NUMBERS, append_run
from train.common.errors import UserError


def test_attention_by_hand():
    """12 tokens that see all 12 and the blank: 13 x (4 x 8 + 2 x 5 x 2) operations each, two images."""
    positions = grid_positions((3, 4), "cpu")[None]
    everyone = stage_geometry(positions, 4, 12, (3, 4))
    attention = fast.attention.Attention(8, 2)
    assert attention_flop(attention, torch.zeros(2, 12, 8), everyone) == 2 * 12 * 13 * (4 * 8 + 2 * 5 * 2)
    near = stage_geometry(positions, 4, 8, (3, 4))
    assert attention_flop(attention, torch.zeros(2, 12, 8), near) == 2 * 12 * 9 * (4 * 8 + 2 * 5 * 2)


def test_merging_by_hand():
    """3 kept tokens of 5 neighbours: 4 weights of 5 numbers, then 4 x 16 products, each."""
    assert merge_flop((1, 12, 16), (1, 12), (1, 12, 2), (1, 3), (1, 3, 5), (8, 4)) == 2 * 15 * 4 * (5 + 16)


def test_every_operator_is_counted_once_whatever_the_path():
    """An image's count: its linear layers and convolutions by the counter, and all that it sees as one step."""
    model = fast.create_model("aff_nano", num_classes=10).eval()
    image = torch.randn(1, 3, 64, 64)
    model(image)
    known = torch.utils.flop_counter.FlopCounterMode(display=False)
    with known, torch.no_grad():
        stages = model.forward_features(image, return_stages=True)[1]
    local, merges = 0, 0
    for stage, depth, dim, heads in zip(stages, (1, 1, 2, 1), (16, 32, 48, 64), (1, 2, 3, 4), strict=True):
        n, neighbours = stage.positions.shape[1], {256: 48, 64: 48, 16: 16, 4: 4}[stage.positions.shape[1]]
        local += depth * n * (neighbours + 1) * (4 * dim + 10 * heads)
        merges += 2 * (n // 4) * neighbours * 4 * (5 + dim) if n > 4 else 0
    head = 2 * 64 * 10
    assert count_flops(model, image) == known.get_total_flops() + head + local + merges
    batch = count_flops(model, image.expand(3, -1, -1, -1))
    assert batch == 3 * count_flops(model, image)


def test_fewer_tokens_cost_less_and_the_choice_of_tokens_nothing():
    full, gridded, fifth = (
        fast.create_segmenter("aff_nano", num_classes=1, backbone_overrides=changes).eval()
        for changes in ({}, {"alpha": 0}, {"rate": 0.2})
    )
    image = torch.randn(1, 3, 64, 64)
    counts = [count_flops(model, image) for model in (full, gridded, fifth)]
    assert counts[0] == counts[1] > counts[2]


COMMON = dict.fromkeys(NUMBERS, 1.0) | {"settings": "s", "machine": "m", "versions": "v"}


def test_picture_by_area(tmp_path, capsys):
    table = tmp_path / "t.csv"
    with pytest.raises(UserError, match=r"t\.csv has no seed with all of these rows"):
        areas.main([str(table), "--config", "nuclei"])
    for row, seed, small in (
        ("full", 0, 40.0),
        ("full", 1, 42.0),
        ("full", 2, 9.0),
        ("gridded", 0, 30.0),
        ("gridded", 1, 34.0),
    ):
        append_run(table, COMMON | {"row": row, "seed": seed, "AP_small": small, "AP_large": None if seed else 3.0})
    assert areas.main([str(table), "--config", "nuclei"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 seeds: 0, 1" and [line.split()[0] for line in lines].count("AP_large") == 0
    assert "AP_small    41.0" in lines[3] and lines[-2].endswith("AP_small    32.0  -9.0 (-21.7 to +3.7)")
    assert (tmp_path / "t_areas.png").read_bytes().startswith(b"\x89PNG")


def test_picture_over_cost(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cost, "PICTURES", 1)
    monkeypatch.setattr(cost, "ROUNDS", 1)
    table = tmp_path / "t.csv"
    with pytest.raises(UserError, match=r"t\.csv has no seed with all of these rows"):
        cost.main([str(table), "--config", "small_digits"])
    for row, seed, ap in (
        ("full", 0, 40.0),
        ("full", 1, 42.0),
        ("full", 2, 50.0),
        *(("rate_1_5", n, 30.0) for n in (0, 2)),
    ):
        append_run(table, COMMON | {"row": row, "seed": seed, "AP": ap})
    threads = torch.get_num_threads()
    assert cost.main([str(table), "--config", "small_digits"]) == 0
    text = capsys.readouterr().out
    large = ("--data.digits", "{height: 128, width: 128}", "--evaluator.tile", "64")
    assert cost.main([str(table), "--config", "small_digits", *large]) == 0
    torch.set_num_threads(threads)
    operations = [line.split("ms")[1] for line in text.splitlines()[1:]]
    assert [line.split("ms")[1] for line in capsys.readouterr().out.splitlines()[1:]] == operations
    assert "mean over seeds 0, 2" in text and "AP  45.0 " in text and "AP  30.0 " in text
    assert table.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
