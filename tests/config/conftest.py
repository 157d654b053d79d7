"""What the tests of the configuration share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deepspeed.utils.logging import logger, warn_once


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The log, as if nothing had been warned of before; see its `messages`."""
    warn_once.cache_clear()
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
