"""Fixtures of the optimizer and schedule tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from deepspeed.utils.logging import logger, warn_once


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """The texts that the package logs, also those it would say once only."""
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    warn_once.cache_clear()
    logger.addHandler(handler)
    yield texts
    logger.removeHandler(handler)
