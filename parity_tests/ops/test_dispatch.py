"""Which path is taken: the choice, the switch, and what happens when a kernel fails."""

import subprocess
import sys

import pytest
import torch

from fast import create_model, doctor
from fast.ops import dispatch
from fast.ops.nearest import cuda_support as cuda

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(dispatch, "_failed", {})
    monkeypatch.setattr(dispatch, "_missing", set())


def test_a_cpu_takes_the_best_path_that_it_can():
    taken = {operator: dispatch.path(operator, CPU) for operator in dispatch.PATHS}
    assert taken == {"neighbors": "grid", "attention": "clusters", "merging": "gather", "interpolation": "gather"}


def test_force_holds_inside_the_block_alone_and_nests():
    with dispatch.force(attention="gather"):
        with dispatch.force(attention="clusters", neighbors="brute"):
            assert (dispatch.path("attention", CPU), dispatch.path("neighbors", CPU)) == ("clusters", "brute")
        assert dispatch.path("attention", CPU) == "gather"
    assert dispatch.path("attention", CPU) == "clusters"


def test_unknown_operators_and_paths_are_named():
    with pytest.raises(ValueError, match="no operator 'atention'; there are neighbors, attention"):
        dispatch.force(atention="gather").__enter__()
    with pytest.raises(ValueError, match="merging has no path 'clusters', only triton, gather"):
        dispatch.force(merging="clusters").__enter__()


def test_a_forced_path_that_cannot_be_taken_is_an_error():
    with (
        dispatch.force(neighbors="cuda"),
        pytest.raises(RuntimeError, match="forced path cuda cannot be taken: needs a"),
    ):
        dispatch.path("neighbors", CPU)


@pytest.mark.parametrize(
    ("setting", "said"), [("attention=gather", "gather"), ("attention=none", "ValueError: AFF_PATHS: attention has no")]
)
def test_the_environment_forces_paths(setting, said):
    code = "from fast.ops import dispatch; print(dispatch.path('attention', 'cpu'))"
    environment = {"AFF_PATHS": setting, "PATH": ""}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert said in (run.stdout + run.stderr)


def broken():
    raise RuntimeError("ptxas: unsupported\nsecond line")


def test_a_failing_kernel_falls_back_once_with_one_warning(monkeypatch):
    monkeypatch.setattr(dispatch, "why_not", lambda *where: dispatch._failed.get(where[:2]))
    ways = {"triton": broken, "clusters": lambda: "by clusters"}
    with pytest.warns(
        UserWarning, match="path triton failed: RuntimeError: ptxas: unsupported; using clusters"
    ) as seen:
        assert [dispatch.run("attention", CPU, ways) for _ in range(2)] == ["by clusters"] * 2
    assert len(seen) == 1
    assert dispatch.why_not("attention", "triton", CPU) == "failed: RuntimeError: ptxas: unsupported"


def test_an_error_in_plain_pytorch_is_no_reason_to_fall_back():
    with pytest.raises(RuntimeError, match="ptxas"):
        dispatch.run("attention", CPU, {"clusters": broken, "gather": lambda: "plain"})


def test_a_gpu_without_cupy_is_told_once_what_is_missing(monkeypatch):
    monkeypatch.setattr(cuda, "unavailable", lambda: "CuPy is not installed")
    with pytest.warns(UserWarning, match="neighbors: no path cuda: CuPy is not installed; using grid") as seen:
        assert [dispatch.path("neighbors", "cuda") for _ in range(2)] == ["grid", "grid"]
    assert len(seen) == 1


@pytest.mark.parametrize("error", [ValueError, TypeError, torch.OutOfMemoryError])
def test_wrong_input_is_no_reason_to_fall_back(error):
    def refuse():
        raise error("too many")

    with pytest.raises(error, match="too many"):
        dispatch.run("attention", CPU, {"clusters": refuse, "gather": lambda: "plain"})
    assert dispatch.path("attention", CPU) == "clusters"


def test_a_forced_kernel_that_fails_does_not_fall_back(monkeypatch):
    monkeypatch.setattr(dispatch, "why_not", lambda *where: None)
    with dispatch.force(attention="triton"), pytest.raises(RuntimeError, match="ptxas"):
        dispatch.run("attention", CPU, {"triton": broken, "clusters": lambda: "by clusters"})


def test_the_doctor_names_every_operator_its_path_and_why_not_the_others(capsys):
    assert doctor.main(["--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert "attention: clusters (PyTorch, dense products inside each cluster)" in told
    assert "    not triton: needs a CUDA device, not cpu" in told
    assert "    not brute: a better one is there" in told


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
    expected = model(images)
    for paths in ({"attention": "gather"}, {"neighbors": "brute"}, {"attention": "gather", "neighbors": "brute"}):
        with dispatch.force(**paths):
            torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-10)
