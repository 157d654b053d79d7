"""Folders on a real disk and in memory, and means of I/O."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepspeed.config.storage import AioConfig
from deepspeed.tiers.io_queue import open_queue
from deepspeed.tiers.native_queue import library
from deepspeed.tiers.request import Means
from deepspeed.utils.errors import DeepSpeedError

ALL_MEANS = [Means.IO_URING, Means.LIBAIO, Means.THREADS, Means.PYTHON]


@pytest.fixture(params=ALL_MEANS, ids=lambda means: means.name.lower())
def means(request: pytest.FixtureRequest) -> Means:
    """Each way to ask the operating system that exists here."""
    return available(request.param)


def available(means: Means) -> Means:
    """`means`, or a skip that says why this machine has none."""
    if means is not Means.PYTHON and library() is None:
        pytest.skip("the native library was not built")
    try:
        open_queue(AioConfig(), means).close()
    except DeepSpeedError as error:
        pytest.skip(str(error))
    return means


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A folder on tmpfs."""
    if not Path("/dev/shm").is_dir():
        pytest.skip("this machine has no /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)
