"""Which path is taken: the choice, the switch, and what happens when a kernel fails."""

import os
import subprocess
import sys

import pytest
import torch

from fast import create_model, doctor
from fast.ops import dispatch, native, support

CPU = torch.device("cpu")
WITHOUT_COMPILER = {operator: "plain" for operator in dispatch.PATHS} | {"nearest": "grid", "attention": "clusters"}
ONEDNN = {"linear": "plain" if support.onednn_unavailable() else "onednn"}
COMPILED = native.unavailable() is None


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(dispatch, "_failed", {})
    monkeypatch.setattr(dispatch, "_chosen", {})


@pytest.fixture
def gpu_like(monkeypatch):
    """Let every kernel seem to be there."""
    monkeypatch.setattr(support, "unavailable", lambda kind, device, interpreter=False: None)


def test_a_cpu_takes_the_best_path_that_it_can():
    taken = {operator: dispatch.path(operator, CPU) for operator in dispatch.PATHS}
    compiled = {operator: "cpu" for operator, paths in dispatch.PATHS.items() if "cpu" in paths and COMPILED}
    assert taken == WITHOUT_COMPILER | compiled | ONEDNN


def test_without_a_compiler_pytorch_is_taken(monkeypatch):
    monkeypatch.setattr(native, "unavailable", lambda: "no C++ compiler: apt install g++, or pip install ziglang")
    taken = {operator: dispatch.path(operator, CPU) for operator in dispatch.PATHS}
    assert taken == WITHOUT_COMPILER | ONEDNN
    assert dispatch.why_not("attention", "cpu", CPU) == "no C++ compiler: apt install g++, or pip install ziglang"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_choice_does_not_depend_on_the_mode_it_is_made_in(mode):
    with mode():
        taken = {operator: dispatch.path(operator, CPU) for operator in dispatch.PATHS}
    dispatch._chosen.clear()
    assert taken == {operator: dispatch.path(operator, CPU) for operator in dispatch.PATHS}
    assert not dispatch._failed


def test_force_holds_inside_the_block_alone_and_nests():
    before = dispatch.path("attention", CPU)
    with dispatch.force(attention="plain"):
        with dispatch.force(attention="clusters", nearest="plain"):
            assert (dispatch.path("attention", CPU), dispatch.path("nearest", CPU)) == ("clusters", "plain")
        assert dispatch.path("attention", CPU) == "plain"
    assert dispatch.path("attention", CPU) == before != "plain"


def test_a_gpu_misses_no_path_that_is_for_cpus(recwarn):
    assert dispatch.path("ordering", torch.device("cuda")) == "plain" and not recwarn.list


def test_unknown_operators_and_paths_are_named():
    with pytest.raises(ValueError, match="no operator 'atention'; there are nearest, attention"):
        dispatch.force(atention="plain").__enter__()
    with pytest.raises(
        ValueError, match=f"merging has no path 'clusters', only {', '.join(dispatch.PATHS['merging'])}"
    ):
        dispatch.force(merging="clusters").__enter__()


def test_a_forced_path_that_cannot_be_taken_is_an_error():
    with (
        dispatch.force(nearest="cuda"),
        pytest.raises(RuntimeError, match="forced path cuda cannot be taken: needs a"),
    ):
        dispatch.path("nearest", CPU)


@pytest.mark.parametrize(
    ("setting", "said"), [("attention=plain", "plain"), ("attention=none", "ValueError: AFF_PATHS: attention has no")]
)
def test_the_environment_forces_paths(setting, said):
    code = "from fast.ops import dispatch; print(dispatch.path('attention', 'cpu'))"
    environment = {"AFF_PATHS": setting, "PATH": ""}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert said in (run.stdout + run.stderr)


def broken(*_):
    raise RuntimeError("ptxas: unsupported\nsecond line")


def trial_that(monkeypatch, triton):
    """Replace attention's tiny case: by Triton it does as ``triton``, by others it gives ones; count the calls."""
    calls = []

    def tiny(path, device):
        calls.append(path)
        return triton() if path == "triton" else [torch.ones(3)]

    monkeypatch.setitem(dispatch._trials, "attention", tiny)
    return calls


def test_a_kernel_that_fails_on_the_tiny_case_is_not_taken_and_the_reason_is_kept(monkeypatch, gpu_like):
    calls = trial_that(monkeypatch, broken)
    assert [dispatch.path("attention", CPU) for _ in range(3)] == [dispatch.PATHS["attention"][1]] * 3
    assert calls.count("triton") == 1  # decided once
    said = dispatch.why_not("attention", "triton", CPU)
    assert said == "fails on a tiny case: RuntimeError: ptxas: unsupported"


@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_a_kernel_that_computes_the_tiny_case_wrong_is_not_taken(wrong, monkeypatch, gpu_like):
    trial_that(monkeypatch, lambda: [torch.tensor([1.0, 1.0, wrong])])
    assert dispatch.path("attention", CPU) == dispatch.PATHS["attention"][1]
    assert dispatch.why_not("attention", "triton", CPU) == "computes a tiny case wrong"


def test_a_kernel_that_fails_later_fails_loudly_with_the_switch_to_set():
    message = "attention: path triton failed: RuntimeError: ptxas: unsupported; set AFF_PATHS=attention=plain"
    with pytest.raises(RuntimeError, match=message):
        dispatch.run("attention", "triton", broken, torch.ones(1))


@pytest.mark.parametrize("error", [ValueError, TypeError, torch.OutOfMemoryError])
def test_wrong_input_is_the_caller_s_own_error(error):
    def refuse(*_):
        raise error("too many")

    with pytest.raises(error, match="^too many$"):
        dispatch.run("attention", "clusters", refuse, torch.ones(1))


def test_a_gpu_without_cupy_is_told_once_what_is_missing(monkeypatch):
    monkeypatch.setattr(support, "cuda_unavailable", lambda: "CuPy is not installed")
    with pytest.warns(UserWarning, match="nearest: no path cuda: CuPy is not installed; using grid") as caught:
        assert [dispatch.path("nearest", "cuda") for _ in range(2)] == ["grid", "grid"]
    assert len(caught) == 1


def test_the_doctor_names_every_operator_its_path_and_why_not_the_others(capsys):
    assert doctor.main(["--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert f"attention: {dispatch.path('attention', CPU)} (" in told
    assert "    not triton: needs a CUDA device, not cpu" in told
    assert "    not plain: a better one is there" in told


def test_the_doctor_says_how_threads_wait(capsys, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "100")
    doctor.main(["--device", "cpu"])
    assert f"threads  {torch.get_num_threads()}, waiting by GOMP_SPINCOUNT=100\n" in capsys.readouterr().out
    monkeypatch.delenv("GOMP_SPINCOUNT")
    doctor.main(["--device", "cpu"])
    assert "set GOMP_SPINCOUNT=100 before Python starts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, "100 None"), ({"GOMP_SPINCOUNT": "7"}, "7 None"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None ACTIVE")],
    ids=["nothing", "a_count", "a_policy"],
)
def test_training_sets_how_threads_wait_before_torch_is_there_unless_the_user_has(given, found):
    code = """
import sys, os, train
assert "torch" not in sys.modules
print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"))
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | given
    options = {"capture_output": True, "text": True, "env": environment, "check": True}
    assert subprocess.run([sys.executable, "-c", code], **options).stdout == found + "\n"
    fast_alone = code.replace('os, train\nassert "torch" not in sys.modules', "os, fast")
    run = subprocess.run(
        [sys.executable, "-c", fast_alone], capture_output=True, text=True, env=environment, check=True
    )
    assert run.stdout == " ".join(str(given.get(n)) for n in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")) + "\n"


def test_the_doctor_checks_the_paths_against_each_other(capsys, monkeypatch):
    assert doctor.main(["--device", "cpu", "--check"]) == 0
    assert "all paths agree" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "TOLERANCE", -1.0)
    assert doctor.main(["--device", "cpu", "--check"]) == 1


def test_the_doctor_refuses_a_device_that_is_not_there(capsys):
    assert doctor.main(["--device", "abacus"]) == 2
    assert capsys.readouterr().err.startswith("error: --device abacus")


def test_all_paths_of_the_model_agree():
    torch.manual_seed(0)
    model, images = create_model("aff_nano", num_classes=10).double().eval(), torch.randn(2, 3, 64, 96).double()
    plainest = {operator: paths[-1] for operator, paths in dispatch.PATHS.items()}
    with dispatch.force(**plainest):
        expected = model(images)
    for operator, paths in dispatch.PATHS.items():
        for path in paths[:-1]:
            if dispatch.why_not(operator, path, CPU) is None:
                with dispatch.force(**plainest | {operator: path}):
                    torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-10)
