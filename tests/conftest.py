"""For every test: the pools of `harness.py` end with the session, and the test process leaks no environment variable."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests import harness


@pytest.fixture(autouse=True)
def _no_leaked_environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    leaked = harness.changed_environment(before)
    for name in leaked:
        os.environ.pop(name, None)
    os.environ.update({name: before[name] for name in leaked if name in before})
    assert not leaked, f"the test left environment variables changed: {', '.join(leaked)}"


def pytest_sessionfinish() -> None:
    """End the worker processes."""
    harness.close_pools()
