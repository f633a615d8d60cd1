"""Settings of every test: deterministic, one thread, full precision; and the parity table at the end of the run."""

import os

import pytest
import torch
from hypothesis import settings

from parity_tests.compare import TABLE

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported
torch.set_num_threads(1)
torch.set_float32_matmul_precision("highest")
settings.register_profile("parity", derandomize=True, deadline=None, max_examples=40, database=None)
settings.load_profile("parity")


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request):
    """Every device there is."""
    return request.param


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(monkeypatch):
    """Fill memory that no operation has written yet with NaN (integers: their largest), so that nobody relies on it."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_sessionfinish(session):
    """Send what one of several processes (pytest-xdist) compared to the one that prints."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["parity"] = TABLE.pack()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Take in what another process compared; one that died sends nothing."""
    TABLE.add(getattr(node, "workeroutput", {}).get("parity", "[]"))


def pytest_terminal_summary(terminalreporter):
    """Print what was compared."""
    if TABLE.rows:
        terminalreporter.section("parity of fast with reference")
        for line in TABLE.lines():
            terminalreporter.write_line(line)
