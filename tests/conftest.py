"""The settings and fixtures of ``parity_tests`` for the tests of this folder, too."""

import pytest
import torch

from parity_tests.conftest import device, fresh_memory_is_nan  # noqa: F401


@pytest.fixture(autouse=True)
def same_threads():
    """Put back the number of threads, which commands set."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
