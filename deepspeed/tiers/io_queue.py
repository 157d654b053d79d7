"""Which queue carries requests out: the native one, or the one in Python where the package has no native library.

Called by the store, the handle and the commands.
"""

from __future__ import annotations

from deepspeed.config.storage import AioConfig
from deepspeed.kernels.native import warn_slower
from deepspeed.tiers.native_queue import NativeQueue, library
from deepspeed.tiers.python_queue import PythonQueue
from deepspeed.tiers.request import IoQueue, Means


def open_queue(aio: AioConfig, means: Means = Means.AUTO) -> IoQueue:
    """A queue as the `aio` section says. Raises DeepSpeedError if the means that is asked for does not exist here."""
    if means is Means.AUTO and library() is None:
        warn_slower("File I/O runs on threads in Python")
        means = Means.PYTHON
    if means is Means.PYTHON:
        return PythonQueue(aio)
    return NativeQueue(aio, means)
