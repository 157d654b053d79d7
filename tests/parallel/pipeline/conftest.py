"""`make test-pipeline` runs each test over many more cases, and gives it the time for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel.pipeline.models import LONG


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of this folder alone; a test's own mark comes first."""
    for item in items:
        if LONG and Path(__file__).parent in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(1800))
