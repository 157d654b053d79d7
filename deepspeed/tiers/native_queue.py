"""The native queue, stub until csrc/aio.cpp is there."""

from __future__ import annotations

import ctypes

from deepspeed.config.storage import AioConfig
from deepspeed.tiers.python_queue import PythonQueue
from deepspeed.tiers.request import Means


def library() -> ctypes.CDLL | None:
    return None


def NativeQueue(aio: AioConfig, means: Means) -> PythonQueue:  # noqa: N802
    return PythonQueue(aio)
