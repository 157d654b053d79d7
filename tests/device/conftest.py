"""Tests on the simulated device need a C++ compiler. DS_TEST_DEVICE=1 (`make test-device`) runs the whole matrix, not a selection."""

from __future__ import annotations

import pytest

from tests.device.build import compiler, library


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip where there is nothing to compile the device with."""
    if compiler() is None:
        for item in items:
            if "/tests/device/" in str(item.path):
                item.add_marker(pytest.mark.skip(reason="the simulated device needs a C++ compiler (g++, or CXX)"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compile before the first test, whose time is limited, if any of the selected needs it."""
    if compiler() is not None and any("/tests/device/" in str(item.path) for item in session.items):
        library()
