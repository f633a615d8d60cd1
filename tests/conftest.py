"""The settings and fixtures of ``parity_tests`` for the tests of this folder, too."""

from parity_tests.conftest import device, fresh_memory_is_nan  # noqa: F401
