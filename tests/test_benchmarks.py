"""The benchmarks measure what they say and print no speed on red; the README shows the committed rows."""

import importlib
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fast.backbone
from benchmarks import busy, cases, measure, models, plot, results, run, table
from benchmarks.cases import BACKWARD, SWIN, SWIN_MINI, SWIN_SEGMENTER, Case, Comparison
from benchmarks.clock import seconds
from fast.ops import dispatch
from train.common.errors import UserError

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TINY = Case("model", "aff_nano", size=(64, 64), batch=2)


@pytest.fixture
def bench():
    """A bench whose clock and memory are dictated: plain paths take four times as long, Swin half as long."""
    return run.Bench(CPU, 1, rounds=3, budget=0)


@pytest.fixture
def dictated(monkeypatch):
    """Nothing runs: a case is its own function, and its time and memory follow from its name."""

    def cost(case):
        return 4.0 if case.plain else 0.5 if case.what in (SWIN, SWIN_MINI, SWIN_SEGMENTER) else 1.0

    monkeypatch.setattr(measure, "prepare", lambda case, device: case)
    monkeypatch.setattr(run, "seconds", lambda case, device: cost(case))
    monkeypatch.setattr(measure, "memory", lambda case, *_: measure.Peak(400 + cost(case), cost(case), cost(case)))
    monkeypatch.setattr(models, "geometry_share", lambda case, device: [(0.2, 1.0), (0.1, 0.8)])


def rows_of(bench, comparisons, path):
    """Measure, write, and read what was written."""
    for comparison in comparisons:
        bench.measure(comparison)
    results.write(path, bench.rows)
    return results.read(path)


def test_quick_run_measures_every_kind_and_writes_it(tmp_path):
    command = [sys.executable, "-m", "benchmarks.run", "--quick", "--device", "cpu", "--threads", "1"]
    only = "model: aff_nano, training|geometry: |operator: (nearest tokens|attention)"
    command += ["--only", only, "--out", tmp_path / "rows.csv"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = results.read(tmp_path / "rows.csv")
    assert {row["group"] for row in rows} == {"model", "geometry", "operator"}
    for row in rows:
        assert all(row[name] for name in ("median_ms", "repeats", *results.SOURCE[1:])), row
        assert float(row["min_ms"]) <= float(row["median_ms"]) <= float(row["max_ms"])
        assert bool(row["peak_mib"]) != (row["group"] == "geometry")
    (step,) = results.find(rows, what="aff_nano", task=cases.STEP, paths="fastest")
    assert step["to_swin"] and step["to_plain"] and float(step["rise_mib"]) < float(step["peak_mib"])


def test_nothing_is_printed_when_a_parity_test_fails(tmp_path, monkeypatch, capsys):
    red = tmp_path / "test_red.py"
    red.write_text("def test_red():\n    assert False\n")
    monkeypatch.setattr(run, "QUICK", (str(red),))
    monkeypatch.setattr(run.Bench, "measure", lambda *_: pytest.fail("measured on red"))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    assert run.run_command(run.main, ["--quick", "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "error: parity tests fail, so nothing was timed" in captured.err


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_every_case_rests_on_tests_that_exist(device_type):
    everything = cases.comparisons(device_type)
    for comparison in everything:
        tests = run.tests_of([comparison])
        assert tests and all((run.TESTS / test).is_file() for test in tests)
    keys = [(c.case, tuple(c.rivals())) for c in everything]
    assert len(set(keys)) == len(keys)


def test_all_that_the_issue_names_is_measured_on_a_cpu():
    found = {(c.case.what, c.case.task, c.case.size, c.case.batch) for c in cases.comparisons("cpu")}
    for name in ("aff_mini", "aff_tiny"):
        assert {(name, "forward", (224, 224), b) for b in (1, 4, 8)} <= found
        assert {(name, cases.STEP, (224, 224), b) for b in (1, 4, 8)} <= found
    assert {("aff_mini", "forward", size, 1) for size in cases.LARGE} | {
        ("aff_mini", "forward", (224, 224), 64)
    } <= found
    operators = {*cases.NEIGHBORS, "attention", "merging", "deformable reading"}
    assert operators == {c.case.what for c in cases.comparisons("cpu") if c.case.group == "operator"}


def test_calls_alternate_and_the_first_of_each_does_not_count():
    calls, ticks = [], {"a": iter([90, 1, 2, 3]), "b": iter([90, 2, 8, 4])}

    def clock(name):
        calls.append(name)
        return next(ticks[name])

    ours, theirs = measure.alternate(["a", "b"], 9, 0, clock)
    assert "".join(calls) == "abababab" and (ours, theirs) == ([1, 2, 3], [2, 8, 4])
    assert measure.ratios(ours, theirs) == (0.5, 0.25, 0.75)  # not 2 / 4, though that is as much here
    assert measure.ratios([1, 4, 9], [1, 8, 3])[0] == 1  # the ratio of the medians would be 4 / 3


def hold(mebibytes):
    """Hold some memory for a moment and return the process's peak before and with it."""
    torch.ones(2**18)  # what torch loads and starts for its first tensor is not what is held
    before = measure.resident_peak()
    held = torch.ones(mebibytes * 2**18)
    return before, measure.resident_peak(), len(held)


def test_peak_memory_is_that_of_a_process_of_its_own():
    held = torch.ones(400 * 2**18)  # ours, which the other process must not be charged with
    before, peak, _ = measure.in_own_process(hold, 200)
    assert 195 < peak - before < 215
    assert before < measure.resident_peak() - 300
    assert len(held)


def test_a_process_that_dies_is_an_error_not_a_wait():
    with pytest.raises(RuntimeError):
        measure.in_own_process(importlib.import_module("os")._exit, 9)


@pytest.mark.parametrize("what", ["attention", "nearest clusters"])
def test_a_plain_case_takes_the_plain_path(what, monkeypatch):
    taken, operator = [], {"attention": "attention"}.get(what, "nearest")
    case = Case("operator", what, BACKWARD, (64, 64), 1, stage=2, plain=True)
    whole = dispatch.path

    def watched(name, device):
        taken.append((name, whole(name, device)))
        return taken[-1][1]

    monkeypatch.setattr(dispatch, "path", watched)
    measure.prepare(case, CPU)()
    assert {path for name, path in taken if name == operator} <= {measure.PLAIN[operator]}
    assert dispatch.forced(operator) is None
    assert run.operators.has_plain_rival(replace(case, plain=False), CPU)


@pytest.mark.parametrize("stage", [1, 2])
def test_both_sides_of_the_attention_benchmark_compute_the_same(stage, monkeypatch):
    found = []
    monkeypatch.setattr(run.operators, "_run", lambda case, forward, inputs: found.append(forward()))
    case = Case("operator", "attention", BACKWARD, (64, 64), 2, stage=stage)
    for plain in (False, True):
        with dispatch.force(**measure.PLAIN if plain else {}):
            run.operators.prepare(replace(case, plain=plain), CPU)
    positions = run.operators.tokens((16, 16), stage, 2, CPU)
    geometry = run.operators._geometry(positions, stage, (16, 16))
    torch.testing.assert_close(*map(geometry.from_clusters, found))


def test_share_of_geometry_counts_what_geometry_takes(monkeypatch):
    made = fast.backbone.stage_geometry
    monkeypatch.setattr(fast.backbone, "stage_geometry", lambda *a: time.sleep(0.02) or made(*a))
    (first, first_pass), (following, next_pass) = models.geometry_share(TINY, CPU)
    assert 4 * 0.02 < first < first_pass and 3 * 0.02 < following < next_pass


def test_rows_hold_ratios_of_time_and_memory(bench, dictated, tmp_path):
    rows = rows_of(bench, [Comparison(TINY, swin=True, plain=True)], tmp_path / "rows.csv")
    ours, swin, plain = rows
    assert (ours["what"], swin["what"], plain["paths"]) == ("aff_nano", SWIN, "plain")
    assert (ours["to_swin"], ours["to_plain"]) == ("2", "0.25")
    assert (ours["memory_to_swin"], ours["memory_to_plain"], ours["peak_mib"]) == ("2", "0.25", "401")
    assert f"attention={dispatch.path('attention', CPU)}" in ours["taken"] and "attention=plain" in plain["taken"]
    assert swin["taken"] == swin["to_swin"] == ""


def test_attention_is_held_against_the_processor(bench, dictated, monkeypatch, tmp_path):
    case = Case("operator", "attention", size=(224, 224), batch=4, stage=1)
    flops = 4 * 56 * 56 * 48 * 64 * 2 * 2  # tokens, neighbours, channels, weights and sum, multiply and add
    assert run.operators.attention_flops(case) == flops
    assert run.operators.attention_flops(replace(case, task=BACKWARD)) == 3.5 * flops
    monkeypatch.setattr(measure, "fma_peak", lambda: 2.0 * flops)
    (row,) = rows_of(bench, [Comparison(case)], tmp_path / "rows.csv")
    assert table.limit(row) == [table.number(flops / 1e9), "50.0 %"] and table.limit(row | {"gflops": ""}) == ["", ""]


def test_registers_reach_more_than_memory_does():
    if dispatch.path("attention", CPU) != "cpu":
        pytest.skip("no compiler")
    x, y = torch.ones(2**22), torch.ones(2**22)
    took = min(seconds(lambda: torch.add(x, y, out=y), CPU) for _ in range(5))
    assert 2 * len(x) / took < measure.fma_peak() < 1e13 * torch.get_num_threads()


def test_what_fails_is_named_and_the_rest_goes_on(bench, dictated, monkeypatch, capsys):
    def memory(case, *_):
        if case.plain:
            raise RuntimeError("out of memory\nsecond line")
        return measure.Peak(1.0, 1.0, 1.0)

    monkeypatch.setattr(measure, "memory", memory)
    bench.measure(Comparison(TINY, swin=True, plain=True))
    assert [row["what"] for row in bench.rows] == ["aff_nano", SWIN] and bench.failed
    assert "plain paths: RuntimeError: out of memory\n" in capsys.readouterr().err


def test_rows_of_a_part_replace_their_like_and_leave_the_rest(bench, dictated, tmp_path):
    old = rows_of(bench, [Comparison(TINY), Comparison(replace(TINY, batch=4))], tmp_path / "rows.csv")
    new = dict(bench.rows[1], median_ms=7.0)
    results.write(tmp_path / "rows.csv", results.merge(old, [new]))
    again = results.read(tmp_path / "rows.csv")
    assert [row["median_ms"] for row in again] == ["1000", "7"] and again[0] == old[0]


def targets_of(rows, device_type="cpu"):
    return {target.what: target for target in results.targets(rows, device_type)}


def test_targets_are_met_and_missed_by_the_figures(bench, dictated, tmp_path):
    assert all(target.value is None and "not measured" in str(target) for target in targets_of([]).values())
    rows = rows_of(bench, [c for c in cases.comparisons("cpu") if c.case.group != "operator"], tmp_path / "rows.csv")
    found = targets_of(rows)
    assert [t.value for t in found.values()] == pytest.approx([*[2] * 7, 20, 401 / 1024], rel=0.01)
    assert [str(t).rpartition("; ")[2] for t in found.values()] == [*["missed)"] * 8, "met)"]


def test_gpu_targets_are_found_in_gpu_rows(bench, dictated, tmp_path):
    chosen = [c for c in cases.comparisons("cuda") if c.case.batch == 128]
    found = targets_of(rows_of(bench, chosen, tmp_path / "rows.csv"), "cuda")
    assert [t.value for t in found.values()] == pytest.approx([2, 2, 2, 2, *[0.25] * 4])


def test_readme_block_is_replaced_and_nothing_else(bench, dictated, tmp_path):
    text = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    rows = rows_of(bench, cases.comparisons("cpu"), tmp_path / "rows.csv")
    block = table.page(rows, [])
    done = table.replace_block(text, block)
    assert done == f"before\n{table.BEGIN}\n{block}\n{table.END}\nafter\n" and table.replace_block(done, block) == done
    assert "| AFF-Tiny, forward, 224 x 224, batch 4 | 1,000 (1,000 to 1,000) | 2 (2 to 2) |" in block
    assert "No GPU figure has been measured yet." in block and "## GPU" in table.page([], rows)
    for broken in ("no markers", table.END + table.BEGIN, text + text):
        with pytest.raises(UserError, match="the README needs one line"):
            table.replace_block(broken, block)


def test_readme_has_the_tables_of_the_committed_rows():
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    cpu, gpu = (results.read(results.ROOT / name) for name in ("cpu.csv", "gpu.csv"))
    block = table.page(cpu, gpu) if cpu or gpu else text.partition(table.BEGIN)[2].partition(table.END)[0].strip("\n")
    assert table.replace_block(text, block) == text


def test_plot_has_both_axes_logarithmic_and_a_line_for_each_model(bench, dictated, tmp_path):
    rows = rows_of(bench, cases.comparisons("cpu"), tmp_path / "rows.csv")
    (axes,) = plot.draw([rows]).axes
    assert axes.get_xscale() == axes.get_yscale() == "log"
    lines = {line.get_label() for line in axes.containers}
    assert lines == {"AFF-Mini", "AFF-Mini, plain paths", "Swin of AFF-Mini's widths"}
    sizes = [height * width for height, width in ((224, 224), *cases.LARGE)]
    assert plot.throughput(rows, "aff_mini", "fastest") == [(size, 1.0, 0.0, 0.0) for size in sizes]
    plot.draw([rows, rows]).savefig(tmp_path / "two.png")
    assert (tmp_path / "two.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--device", "nonsense"], "--device nonsense"),
        (["--device", "meta"], "only cpu and cuda are timed"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--only", "no such case", "--device", "cpu"], "matches none of"),
        (["--only", "(", "--device", "cpu"], "no regular expression"),
        (["--onl", "x"], "see python -m benchmarks.run --help"),
    ],
)
def test_bad_options_are_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    assert run.run_command(run.main, arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_file_of_other_columns_is_refused(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="is no table of benchmarks.run"):
        results.read(tmp_path / "other.csv")
    assert results.read(tmp_path / "none.csv") == []


def test_numbers_are_written_to_three_digits_without_an_exponent():
    assert [table.number(x) for x in (0.12345, 12345.6, "1.5", "")] == ["0.123", "12,300", "1.5", ""]
    assert math.isclose(float(results.as_text(1234.56)), 1235)


def test_slow_downs_are_told_of_ours_and_of_swin_beside_busy_processes(monkeypatch, capsys):
    """Ours takes 0.2 s and three times as long beside two busy processes, Swin 0.5 s and twice as long."""
    running = []

    class Process:
        def __init__(self, command):
            running.append(self)

        def kill(self):
            running.remove(self)

        def wait(self):
            assert self not in running

    def seconds(case, device):
        ours = case.what == "aff_mini"
        return (0.2 if ours else 0.5) * ((3 if ours else 2) if len(running) == 2 else 1)

    monkeypatch.setattr(busy.subprocess, "Popen", Process)
    monkeypatch.setattr(busy.measure, "prepare", lambda case, device: lambda: case)
    monkeypatch.setattr(busy, "seconds", lambda call, device: seconds(call(), device))
    monkeypatch.setattr(run, "check_parity", lambda tests: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setenv("GOMP_SPINCOUNT", "100")
    busy.main(["--only", "aff_mini, forward"])
    out = capsys.readouterr().out
    assert "waiting policy: GOMP_SPINCOUNT=100" in out and not running
    assert out.splitlines()[-1].endswith("| 200 | 600 | 3.00 x | 2.00 x |")
