"""Ablations: what is taken out is out, rows are held to one budget, and an interruption loses nothing."""

import csv
from pathlib import Path

import pytest
import torch
from torch.nn.utils.parametrize import is_parametrized

import fast
from fast.attention import Attention
from fast.neighborhoods import stage_geometry
from fast.patch_embedding import grid_positions
from fast.position import relative_position
from train import ablate
from train.ablate import settings_of, vary
from train.ablation.pictures import AnyDigit, Shared
from train.ablation.rows import AblatedClassification, Config, take_out
from train.ablation.table import NUMBERS, append_run, interval, read_runs, spread, write_table
from train.common.distributed import Ranks
from train.common.errors import Interrupted, UserError
from train.config.loader import load_config
from train.data.digit_parts import kinds_of
from train.data.segmentation import open_digits
from train.engine.run import Run

POSITIONS = grid_positions((6, 5), "cpu")
TINY = {
    "table.classify.data": {"train_length": 4, "val_length": 2},
    "table.classify.schedule": {"epochs": 1},
    "table.classify.run": {"total_batch": 4, "batch_size": 4},
    "data": {"train_length": 8, "val_length": 2},
    "schedule": {"max_steps": 1, "warmup_steps": 0},
    "run": {"total_batch": 4, "batch_size": 4},
}


def config_of(*overrides):
    """Read the committed table's config."""
    return load_config("digits", overrides, Config)


def run_tiny(path, *more, config="digits"):
    """Run the command on a budget of seconds."""
    sections = {name: keys for name, keys in TINY.items() if config == "digits" or not name.startswith("table")}
    pairs = [(f"--{section}.{key}", str(value)) for section, keys in sections.items() for key, value in keys.items()]
    return ablate.main(["--config", config, "--out", str(path), *(text for pair in pairs for text in pair), *more])


def attend(without=()):
    """Make an attention with weights that matter, a geometry in which every token sees all, and an input."""
    torch.manual_seed(0)
    attention = Attention(8, 2).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    torch.nn.init.normal_(attention.blank_key, std=50)
    geometry = stage_geometry(POSITIONS[None], 4, len(POSITIONS), (6, 5), "scanline", torch.float64)
    x = torch.randn(1, len(POSITIONS), 8, dtype=torch.float64)
    return take_out(torch.nn.ModuleList([attention]), list(without))[0], geometry, x


def change_last_columns(attention):
    """Change what the position term makes of distance, sine and cosine."""
    weights = dict(attention.named_parameters())
    name = next(name for name in weights if name.startswith("position.") and weights[name].ndim == 2)
    with torch.no_grad():
        weights[name][:, 2:] += 1
    return attention


def test_without_expanded_position_only_offsets_are_read():
    attention, geometry, x = attend()
    assert not torch.allclose(attention(x, geometry), change_last_columns(attention)(x, geometry))
    attention, geometry, x = attend(without=["expanded_position"])
    before = attention(x, geometry)
    assert torch.equal(before, change_last_columns(attention)(x, geometry))
    with torch.no_grad():
        attention.position.parametrizations.weight.original[:, 1] += 1
    assert not torch.allclose(before, attention(x, geometry))


def test_without_blank_token_weights_are_those_of_the_neighbours_alone():
    attention, geometry, x = attend(without=["blank_token"])
    original = attend()[0]
    query = original.query(x[0]).view(-1, 2, 4) / 2
    key, value = original.key_value(x[0]).view(-1, 2, 2, 4).unbind(2)
    relative = relative_position(POSITIONS - POSITIONS[:, None], torch.float64)
    logits = torch.einsum("nhd,mhd->nmh", query, key) + original.position(relative)
    expected = original.project(torch.einsum("nmh,mhd->nhd", logits.softmax(dim=1), value).flatten(1))
    assert torch.allclose(attention(x, geometry)[0], expected, rtol=0, atol=1e-10)
    assert not torch.allclose(original(x, geometry)[0], expected, atol=1e-3), "the blank token matters here"


def test_without_blank_token_its_parameters_change_nothing_and_others_learn():
    attention, geometry, x = attend(without=["blank_token"])
    attention(x, geometry).square().sum().backward()
    gradients = {name: each.grad for name, each in attention.named_parameters()}
    assert all(not gradients[name].abs().max() > 1e-12 for name in gradients if "blank" in name)
    assert gradients["query.weight"].abs().max() > 1e-3 and gradients["position.weight"].abs().max() > 1e-3


@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
def test_gridded_keeps_the_coarse_grid_at_every_merge(size):
    backbone = vary(config_of(), "gridded")[1].model.backbone
    model = fast.create_model("aff_nano", **backbone).double()
    for stage in model.stages[:3]:
        torch.nn.init.normal_(stage.importance.weight, std=3)
    stages = model.forward_features(torch.randn(2, 3, *size, dtype=torch.float64), return_stages=True)[1]
    for number, stage in enumerate(stages[:3], 1):
        h, w = (side // 4 // 2**number for side in size)
        coarse = grid_positions((h, w), "cpu") * 2**number
        assert torch.equal(stage.merged_positions, coarse.expand(2, -1, -1))


def test_without_grid_prior_the_scores_decide():
    backbone = vary(config_of(), "no_grid_prior")[1].model.backbone
    scores = torch.rand(1, 64, dtype=torch.float64) * 1e-3 + 0.5
    prior, nothing = (torch.rand(1, 64) > 0.5).double(), torch.zeros(1, 64, dtype=torch.bool)
    kept = fast.selection.select(scores, prior, nothing, 16, backbone["alpha"])
    assert torch.equal(kept, scores.topk(16).indices.sort().values)
    tied = fast.selection.select(torch.full_like(scores, 0.5), prior, nothing, 8, backbone["alpha"])
    assert torch.equal(tied[0], prior[0].nonzero()[:8, 0])


def test_rows_change_the_backbone_of_both_trainings_and_nothing_else():
    config = config_of()
    full, other = (
        [each.model_dump() for each in vary(config, name, 3, "f")] for name in ("full", "no_reserved_tokens")
    )
    for number, key in ((0, "overrides"), (1, "backbone")):
        assert other[number]["model"].pop(key) == {**full[number]["model"].pop(key), "reserve": False}
        assert full[number]["run"]["seed"] == 3
    late = vary(config, "rate_1_5")
    assert "rate" not in late[0].model.overrides and late[1].model.backbone["rate"] == 0.2
    assert full == other and config.run.seed == 0 and "seed" not in config.table.classify["run"]


def test_a_row_sets_keys_of_its_training_and_of_no_other():
    config = config_of("--table.rows", "{full: {}, fast: {overrides: {optim.lr: 0.5, data.flip: 0.25}}}")
    full, fast_row = (vary(config, name, 3)[1].model_dump() for name in ("full", "fast"))
    assert (fast_row["optim"].pop("lr"), fast_row["data"].pop("flip")) == (0.5, 0.25)
    assert full["optim"].pop("lr") == 2e-3 and full["data"].pop("flip") == 0 and full == fast_row
    assert settings_of(config, "full") == settings_of(config_of(), "full") != settings_of(config, "fast")


def test_rows_with_other_data_open_their_own():
    shared = Shared()
    full, same, other = (config_of("--data.flip", flip) for flip in ("0.5", "0.5", "0"))
    assert shared.open(full, list) is shared.open(same, list) is not shared.open(other, list)


@pytest.mark.parametrize(
    ("key", "said"),
    [("optim.lrr", "did you mean 'optim.lr'"), ("optim", "unknown key 'optim'"), ("table.one_class", "unknown key")],
)
def test_a_key_that_no_training_has_is_named(key, said):
    config = config_of("--table.rows", f"{{full: {{}}, odd: {{overrides: {{{key}: 1}}}}}}")
    with pytest.raises(UserError, match=f"table.rows.odd.overrides: .*{said}"):
        ablate.check_rows(config)


def classifier_of(name, seed, shared):
    """Make the run, not started, of a row's classifier."""
    config = vary(config_of(), name, seed)[0]
    return Run(config, Ranks("cpu"), AblatedClassification(config, config_of().table.rows[name].without, shared))


def test_rows_of_a_seed_have_the_same_pictures_and_start_alike():
    shared = Shared()
    full, other = (classifier_of(name, 5, shared) for name in ("full", "no_blank_token"))
    assert full.train_set is other.train_set and full.train_set[0, 3] is other.train_set[0, 3]
    start = {
        name.replace("parametrizations.", "").removesuffix(".original"): weight
        for name, weight in other.model.state_dict().items()
    }
    assert all(torch.equal(weight, start[name]) for name, weight in full.model.state_dict().items())
    assert is_parametrized(other.model.stages[3].blocks[0].attention, "blank_key")
    weight = full.model.stages[3].blocks[0].mlp.fc1.weight
    assert float(weight.detach().std()) == pytest.approx(0.88 * 1.4 / 8, rel=0.2)  # 0.88: cut at two deviations
    fresh = classifier_of("full", 6, shared)
    assert shared.seed == 6 and not torch.equal(fresh.train_set[0, 3].image, full.train_set[0, 3].image)


def test_a_run_ablates_both_networks_and_hands_the_backbone_on(tmp_path, monkeypatch):
    real, runs = ablate.train, []
    monkeypatch.setattr(ablate, "train", lambda config, task: runs.append(real(config, task=task)) or runs[-1])
    assert run_tiny(tmp_path / "t.csv", "--rows", "no_expanded_position", "--seeds", "1", "--optim.lr", "1e-12") == 0
    first, second = ({name.removeprefix("backbone."): w for name, w in run.model.state_dict().items()} for run in runs)
    for run in runs:
        attentions = [module for module in run.model.modules() if isinstance(module, Attention)]
        assert len(attentions) == 5 and all(is_parametrized(each.position, "weight") for each in attentions)
    name = "stages.2.blocks.1.attention.position.parametrizations.weight.original"
    assert torch.allclose(first[name], second[name], atol=1e-6) and first[name].abs().max() > 0.1
    assert runs[1].config.model.num_classes == 7


@pytest.mark.parametrize(("one_class", "classes"), [(True, 1), (False, 10)])
def test_instances_without_a_classifier_first(tmp_path, monkeypatch, one_class, classes):
    real, runs, path = ablate.train, [], tmp_path / "t.csv"
    monkeypatch.setattr(ablate, "train", lambda config, task: runs.append(real(config, task=task)) or runs[-1])
    rows = ("--rows", "full,rate_1_5", "--seeds", "3", "--table.one_class", str(one_class).lower())
    assert run_tiny(path, *rows, config="small_digits") == 0
    assert [run.task.command for run in runs] == ["train.segment"] * 2 and runs[0].config.model.num_classes == classes
    assert runs[1].model.backbone.config.rate == 0.2
    (_, first), (_, other) = sorted(read_runs(path).items())
    assert first["accuracy"] is first["PQ"] is None and first["AP"] is not None and other["AP_medium"] is not None
    text = path.with_suffix(".md").read_text()
    assert "| row | seeds | AP | AP50 | AP_small |" in text and "PQ" not in text and "accuracy" not in text
    assert "Every run: 4 pictures for the segmenter; 2 validation pictures." in text
    assert "--config small_digits --rows full,rate_1_5 --out" in text, "the command makes this table and no more"


def test_digits_are_one_class_and_kinds_keep_theirs():
    source = open_digits(config_of(), "val")
    one = AnyDigit(source)
    assert [each.name for each in one.vocabulary.classes] == ["digit", *kinds_of("textures")]
    assert one.vocabulary.things == {0} and list(one.vocabulary.label_of.values()) == list(range(7))
    for index in range(5):
        theirs, ours = source.load(index), one.load(index)
        assert ours.labels.tolist() == [0 if label < 10 else label - 9 for label in theirs.labels]
        assert (ours.masks == theirs.masks).all() and len(one) == len(source)


def test_finished_runs_are_skipped_and_the_table_keeps_its_reading(tmp_path, capsys):
    path = tmp_path / "t.csv"
    assert run_tiny(path, "--rows", "full", "--seeds", "0") == 0
    first = path.read_text()
    page = path.with_suffix(".md")
    page.write_text(page.read_text() + "\n## Reading\n\nNothing follows.\n")
    assert run_tiny(path, "--rows", "full,gridded", "--seeds", "0") == 0
    assert "1 runs are in" in capsys.readouterr().out and path.read_text().startswith(first)
    assert [(run["row"], run["seed"]) for run in csv.DictReader(path.read_text().splitlines())] == [
        ("full", "0"),
        ("gridded", "0"),
    ]
    text = page.read_text()
    assert text.endswith("\n## Reading\n\nNothing follows.\n") and "| gridded | 1 |" in text and "less full" in text


def test_an_interruption_loses_only_the_run_it_hits(tmp_path, monkeypatch):
    path = tmp_path / "t.csv"
    finished = {name: 1.0 for name in NUMBERS}

    def stopped(config, name, seed, folder, shared):
        if name == "gridded":
            raise Interrupted("save")
        return {
            "row": name,
            "seed": seed,
            "settings": settings_of(config, name),
            "machine": "m",
            "versions": "v",
            **finished,
        }

    monkeypatch.setattr(ablate, "make_run", stopped)
    with pytest.raises(Interrupted, match="row gridded, seed 0; .*t.csv keeps"):
        run_tiny(path, "--rows", "full,gridded", "--seeds", "0")
    assert list(read_runs(path)) == [("full", 0)]


def test_no_run_is_begun_that_has_no_time_left(tmp_path, capsys):
    assert run_tiny(tmp_path / "t.csv", "--rows", "full", "--limit-minutes", "-1") == 0
    assert "3 runs were not made for lack of time" in capsys.readouterr().out and not (tmp_path / "t.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--rows", "fall"], r"no row 'fall' \(did you mean 'full'\?\)"),
        (["--seeds", "1,x"], "--seeds takes whole numbers"),
        (["--optim.rate", "1"], "unknown key 'optim.rate'"),
        (["--table.rows.full.backbone", "{alfa: 1}"], r"rows.full.backbone: .*did you mean 'alpha'"),
        (["--table.classify.optim.rate", "1"], "unknown key 'optim.rate'"),
        (["--table.rows.full.backbone.rate", "0.2"], "rate 0.2 is too small for 8 x 8 cells"),
        (["--data.task", "semantic"], "ablations are of objects"),
    ],
)
def test_mistakes_are_named(tmp_path, arguments, complaint):
    with pytest.raises(UserError, match=complaint):
        run_tiny(tmp_path / "t.csv", *arguments)


def test_runs_of_other_settings_are_not_mixed(tmp_path):
    path, config = tmp_path / "t.csv", config_of()
    run = dict.fromkeys(NUMBERS, 1.0) | {"row": "full", "seed": 0, "machine": "m", "versions": "v"}
    append_run(path, run | {"settings": settings_of(config, "full")})
    ablate.check_runs(read_runs(path), config, path)
    with pytest.raises(UserError, match="other settings, as of row full: name another file"):
        ablate.check_runs(read_runs(path), config_of("--schedule.max_steps", "7"), path)
    with pytest.raises(UserError, match="line 2 is not whole"):
        path.write_text(path.read_text()[:-40])
        read_runs(path)


def test_spread_and_differences_are_those_worked_out_by_hand(tmp_path):
    assert spread([1.0, 2.0, None, 6.0]) == "3.0 ± 2.6 (1.0 to 6.0)" and spread([None]) == "-" and spread([2]) == "2.0"
    path = tmp_path / "t.csv"
    common = dict.fromkeys(NUMBERS, 1.0) | {"settings": "s", "machine": "m", "versions": "v"}
    for row, seed, pq in (("full", 0, 10.0), ("full", 1, 20.0), ("gridded", 0, 7.0), ("gridded", 1, 16.0)):
        append_run(path, common | {"row": row, "seed": seed, "PQ": pq})
    write_table(path, ["full", "gridded"], "command")
    text = path.with_suffix(".md").read_text()
    assert "| gridded | 2 | 11.5 ± 6.4 (7.0 to 16.0) |" in text
    assert "| gridded | 2 | -3.5 (-9.9 to +2.9) |" in text  # 12.706 standard errors of 0.5 either way
    assert interval([1.0, None, 2.0, 6.0]) == "+3.0 (-3.6 to +9.6)"  # 4.303 x 2.646 / sqrt(3)


@pytest.mark.parametrize(
    ("table", "config", "overrides"),
    [
        ("ablation_small_digits", "small_digits", []),
        ("sweep_small_digits", "small_digits", []),
        ("ablation_nuclei", "nuclei", []),
        ("ablation_nuclei_1600", "nuclei", ["--schedule.max_steps", "1600"]),
    ],
)
def test_published_tables_are_of_their_configs(table, config, overrides):
    path = Path(ablate.__file__).parents[1] / f"benchmarks/{table}.csv"
    runs = read_runs(path)
    ablate.check_runs(runs, load_config(config, overrides, Config), path)
    assert runs
