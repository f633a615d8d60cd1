"""Training a segmenter: from its YAML, schedules and groups, exact resume, processes, data without objects."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fast.matching import NO_OBJECT_WEIGHT, SetLoss
from tests import seg_trees as trees
from tests.seg_train_cases import KIND, config_of, empty, fit, model_of, run_of
from tests.test_train_resume import assert_same
from train import segment
from train.common.distributed import Ranks
from train.common.errors import Interrupted
from train.config.loader import load_config
from train.config.segmentation import Config
from train.data.sampler import PassSampler
from train.engine import loop as engine
from train.engine.loop import train
from train.engine.optimizer import build_optimizer, peak_rate
from train.engine.scheduler import build_scheduler
from train.models.checkpoint import read_file
from train.models.segmenter import build_model
from train.tasks.segmentation import Segmentation

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_training_from_the_yaml_learns_and_writes_what_it_says(tmp_path, capsys):
    arguments = ["--config", "digits_panoptic_smoke", "--run.output", str(tmp_path), "--data.val_length", "3"]
    assert segment.main([*arguments, "--run.log_every", "1", "--run.ema", "0.5", "--schedule.max_steps", "9"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 9 and np.mean(losses[-2:]) < np.mean(losses[:2])
    evaluated = [line for line in lines if line["kind"] == "eval"]
    assert [line["step"] for line in evaluated] == [4, 8, 9], "also at the end of a part shorter than the others"
    assert {"PQ", "AP", "AP_small", "ema_PQ", "per_class"} <= evaluated[-1].keys() and evaluated[-1]["images"] == 3
    state = read_file(tmp_path / "last.pt", KIND)
    assert state["done"] == 9 and state["task"] == "panoptic" and len(state["vocabulary"]["classes"]) == 16
    assert "9 steps (1.8 passes)" in capsys.readouterr().out


@pytest.mark.parametrize("name", [path.stem for path in sorted(Config.folder.glob("*.yaml"))])
def test_every_config_loads_and_says_what_it_needs(name):
    config = load_config(name, kind=Config)
    head = (Config.folder / f"{name}.yaml").read_text(encoding="utf-8").split("model:")[0]
    assert "-m train." in head and "Hardware" in head and "Score to expect" in head
    if not name.startswith(("digits", "nuclei")):  # the published ones
        assert "published score" in head and "Time: not measured by us" in head
        assert (config.optim.clip, config.optim.backbone, config.optim.weight_decay) == (0.01, 0.1, 0.05)
        assert config.model.backbone["alpha"] == (8 if "cityscapes" in name else 4)
        with torch.device("meta"):
            assert build_model(config).config.num_queries == (250 if name.endswith("base") else 100)


def rates(config, steps):
    """Return the head's and the backbone's learning rate at some steps."""
    layers = torch.nn.ModuleDict({"backbone": torch.nn.Linear(2, 2), "decoder": torch.nn.Linear(2, 2)})
    optimizer = build_optimizer(layers, config)
    scheduler, found = build_scheduler(optimizer, config, 10), []
    for step in steps:
        scheduler.step_update(step)
        groups = {group["lr"] for group in optimizer.param_groups}
        found.append((max(groups), min(groups)))
    return found


def test_poly_and_steps_are_the_published_ones():
    found = rates(load_config("ade20k_tiny", kind=Config), [0, 20000, 79999])
    for (head, backbone), done in zip(found, (0, 0.25, 79999 / 80000), strict=True):
        assert head == pytest.approx(2e-4 * (1 - done) ** 0.9) and backbone == pytest.approx(head / 10)
    found = [head for head, _ in rates(load_config("coco_instance_mini", kind=Config), [0, 81944, 81945, 88772, 88773])]
    assert found == pytest.approx([2e-4, 2e-4, 2e-5, 2e-5, 2e-6])
    warm = config_of("--schedule.warmup_steps", 4, "--schedule.max_steps", 8, "--optim.backbone", 0.1)
    assert [head for head, _ in rates(warm, [0, 2, 4, 6])] == pytest.approx([0, 5e-4, 1e-3, 1e-3 * 0.5**0.9])


def test_rate_follows_the_batch_and_shows_it():
    assert peak_rate(load_config("cityscapes_panoptic_base", kind=Config)) == (
        1e-4, "learning rate 0.0002 x 16 / 32 = 0.0001, backbone x 0.1",
    )  # fmt: skip


def test_groups_spare_norms_embeddings_and_vectors():
    model = model_of("--model.shepard_power", 4, "--model.backbone.layer_scale", 1e-5)
    config = config_of("--optim.backbone", 0.1)
    groups = {id(p): group for group in build_optimizer(model, config).param_groups for p in group["params"]}
    embeddings = ("query_features.weight", "query_positions.weight", "level_embedding", "level_embedding.weight")
    for name, parameter in model.named_parameters():
        if name.endswith("shepard_power"):
            assert id(parameter) not in groups and parameter.tolist() == [2.0] and not parameter.requires_grad
            continue
        free = parameter.ndim < 2 or name.endswith(embeddings)
        assert (groups[id(parameter)]["weight_decay"] == 0) == free, name
        assert groups[id(parameter)]["lr"] == pytest.approx(1e-4 if name.startswith("backbone.") else 1e-3), name
    assert len({id(group) for group in groups.values()}) == 4


def test_muon_steps_matrices_orthogonally_and_leaves_the_rest_to_nadamw():
    model = model_of("--model.backbone.layer_scale", 1e-5)
    config = config_of("--optim.kind", "muon", "--optim.weight_decay", 0, "--optim.backbone", 1, "--optim.lr", 0.01)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    embeddings = ("query_features.weight", "query_positions.weight", "level_embedding", "level_embedding.weight")
    seen = set()
    for name, parameter in model.named_parameters():
        step = (before[name] - parameter.detach()).flatten(1) if parameter.ndim > 1 else None
        matrix = step is not None and not name.endswith(embeddings) and parameter.shape[0] > 1 and min(step.shape) > 3
        assert optimizer.state[parameter]["use_muon"] == matrix, name
        if matrix:  # all singular values near lr x 0.2 sqrt(longer side): the iteration's end is no exact 1
            values = torch.linalg.svdvals(step) / (0.01 * 0.2 * max(step.shape) ** 0.5)
            assert values.min() > 0.4 and values.max() < 1.5, name
        seen.add(matrix)
    assert seen == {True, False}


def test_passes_go_on_where_the_last_ended_and_are_shared_by_ranks():
    config = config_of("--run.batch_size", 1)
    samples, ranks = run_of(config).train_set, Ranks("cpu")
    whole = [key for batch in PassSampler(samples, config, ranks, 0, 8) for key in batch]
    assert [number for number, _ in whole] == [0] * 20 + [1] * 12
    assert sorted(index for number, index in whole if number == 0) == list(range(20))
    assert [key for batch in PassSampler(samples, config, ranks, 5, 8) for key in batch] == whole[20:]
    shares = []
    for rank in (0, 1):
        ranks.rank, ranks.size = rank, 2
        shares.append([key for batch in PassSampler(samples, config, ranks, 0, 8) for key in batch])
    mixed = [key for pair in zip(*(np.array(share).reshape(8, 2, 2) for share in shares), strict=True) for key in pair]
    assert np.array_equal(np.concatenate(mixed), whole)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_stopped_and_resumed_equals_never_stopped_bit_for_bit(tmp_path, monkeypatch, kind):
    options = [
        "--optim.kind",
        kind,
        "--run.ema",
        0.9,
        "--run.batch_size",
        2,
        "--model.backbone.drop_path",
        0.3,
        "--data.val_length",
        2,
    ]
    honest = engine.report

    def stop_at_3(run, *rest):
        run.stop.signal = 2 if run.done == 3 else run.stop.signal
        return honest(run, *rest)

    fit(tmp_path / "whole", *options, "--run.log_every", 1)
    monkeypatch.setattr(engine, "report", stop_at_3)
    config = config_of("--run.output", tmp_path / "stopped", *options, "--run.log_every", 1)
    with pytest.raises(Interrupted, match="stopped at step 4 of 8.*train.segment .*--resume"):
        train(config, task=Segmentation(config))
    train(config, tmp_path / "stopped" / "last.pt", Segmentation(config))
    states = [read_file(tmp_path / name / "last.pt", KIND) for name in ("whole", "stopped")]
    for state in states:
        del state["config"]
    assert_same(*states)


def test_resume_with_other_evaluations_goes_on_at_the_same_update(tmp_path):
    fit(tmp_path, "--schedule.max_steps", 3, "--data.val_length", 1)
    config = config_of("--run.output", tmp_path, "--run.eval_every", 5, "--data.val_length", 1)
    run = run_of(config)
    run.restore(tmp_path / "last.pt")
    assert (run.epoch, run.step, run.done) == (0, 3, 3)


def test_two_processes_equal_one_with_the_joined_batch(tmp_path):
    options = ["--run.batch_norm", "frozen", "--schedule.max_steps", "3", "--data.val_length", "3"]
    command = [*TORCHRUN, "-m", "train.segment", "--config", "digits_panoptic_smoke", *options]
    command += ["--run.output", str(tmp_path / "two"), "--run.batch_size", "1"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    assert "4 = 1 x 2 process(es) x 2 accumulation step(s)" in ended.stdout
    fit(tmp_path / "one", *options)
    start = run_of(config_of()).model.state_dict()
    two, one = (read_file(tmp_path / name / "last.pt", KIND) for name in ("two", "one"))
    assert max((weight - start[name]).abs().max() for name, weight in one["model"].items()) > 1e-3
    for name, weight in one["model"].items():
        assert torch.allclose(two["model"][name], weight, rtol=0, atol=5e-5), name
    last = [json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1]) for name in ("two", "one")]
    assert [line["images"] for line in last] == [3, 3] and last[0]["PQ"] == last[1]["PQ"]


def test_loss_is_the_plain_one_in_float32_under_autocast():
    run = run_of(config_of("--run.amp", "bf16"))
    batch = run.train_set.collate([run.train_set[0, index] for index in range(3)])
    counts = engine.mean_counts(run, [batch])
    loss = engine.batch_loss(run, batch, counts)
    loss.backward()
    assert loss.dtype == torch.float32 and all(p.grad.dtype == torch.float32 for p in run.model.parameters())
    run.task.criterion.points = 4000
    with torch.no_grad():
        output = run.model.eval()(batch.images)
        plain = [float(SetLoss(4000)(output, batch.objects)["loss"]) for _ in range(4)]
        assert float(run.task.loss(output, batch, run.done, counts)) == pytest.approx(np.mean(plain), rel=0.02)
    assert max(plain) < 1.02 * min(plain), "the points drawn matter little"


def test_pieces_of_a_step_know_what_all_of_it_holds():
    run = run_of(config_of())
    pieces = [run.train_set.collate([run.train_set[0, index] for index in pair]) for pair in ((0, 1), (2, 3))]
    counts = [len(each.labels) for piece in pieces for each in piece.objects]
    objects, weight = engine.mean_counts(run, pieces)
    assert objects == sum(counts) / 2
    assert weight == pytest.approx((sum(counts) + NO_OBJECT_WEIGHT * (8 * 4 - sum(counts))) / 2)


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_updates_without_any_object_train_on(amp):
    run = run_of(config_of("--run.amp", amp))
    pieces = [empty(run.train_set.collate([run.train_set[0, index] for index in range(2)]))]
    for _ in range(2):
        loss, norm, _ = engine.train_step(run, pieces)
        run.step += 1
    assert np.isfinite(loss) and loss > 0
    assert all(weight.isfinite().all() for weight in run.model.state_dict().values())


NO_OBJECTS_ON_RANK_1 = """
import os
import sys
from train.config.loader import load_config
from train.common.distributed import Ranks
from train.engine.loop import train
from train.config.segmentation import Config
from train.tasks.segmentation import Segmentation
from tests.seg_train_cases import empty
class Poor(Segmentation):
    def counts(self, batch):
        return super().counts(empty(batch) if os.environ["RANK"] == "1" else batch)
    def targets(self, batch):
        return super().targets(empty(batch) if os.environ["RANK"] == "1" else batch)
config = load_config("digits_panoptic_smoke", sys.argv[1:], Config)
train(config, task=Poor(config))
"""


def test_a_rank_without_objects_trains_on(tmp_path):
    (tmp_path / "poor.py").write_text(NO_OBJECTS_ON_RANK_1)
    options = ["--run.output", str(tmp_path / "run"), "--run.batch_size", "2", "--schedule.max_steps", "2"]
    command = [*TORCHRUN, str(tmp_path / "poor.py"), *options, "--data.val_length", "2"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    state = read_file(tmp_path / "run" / "last.pt", KIND)
    assert state["done"] == 2 and all(weight.isfinite().all() for weight in state["model"].values())


@pytest.mark.parametrize("head", ["mask2former", "hcformer"])
def test_more_queries_than_tokens_train(tmp_path, head):
    options = ["--model.head", head, "--model.overrides.num_queries", 150, "--schedule.max_steps", 1]
    size = ["--data.crop", "[32, 32]", "--data.resize", "short_side", "--data.base", 32]
    run = fit(tmp_path, *options, *size, "--data.val_length", 1)
    assert run.done == 1 and run.last["images"] == 1


def test_own_folder_trains_with_its_own_classes(tmp_path):
    masks = [trees.bands(255), trees.bands(9, 3), trees.bands(0, 3, 9), trees.bands(9, 9), trees.bands(3, 9, 255)]
    root = trees.folder(tmp_path / "own", masks)
    options = ["--data", root, "--data.task", "null", "--data.resize", "short_side", "--data.jitter", "true"]
    config = config_of(*options, "--run.output", tmp_path / "run", "--evaluator.tasks", "[]", "--schedule.max_steps", 2)
    run = train(config, task=Segmentation(config))
    assert config.model.num_classes == 3 and 0 <= run.last["mIoU"] <= 100 and run.last["images"] == 1
