"""The native queue: `csrc/aio.cpp`, through ctypes.

Opened by `io_queue.py`. Calls release the GIL. Requests hold their memory until the library has let go of it, whether
anybody waits for them or not.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from ctypes import POINTER, c_double, c_int, c_int32, c_int64, c_uint64, c_void_p
from typing import final

from deepspeed.config.storage import AioConfig
from deepspeed.kernels.native import library as native_library
from deepspeed.tiers.request import CHECKED, Failure, Fault, Means, Request
from deepspeed.utils.errors import DeepSpeedError

KINDS = (None, "os", "short", "corrupt")


class _Failure(ctypes.Structure):
    _fields_ = (
        ("kind", c_int32),
        ("errno", c_int32),
        ("file", c_int32),
        ("unused", c_int32),
        ("offset", c_int64),
        ("expected", c_uint64),
        ("got", c_uint64),
    )


_SIGNATURES = {
    "ds_aio_open": (c_void_p, [POINTER(c_int), c_int, c_int, c_int64, c_int, c_int, POINTER(c_int)]),
    "ds_aio_close": (None, [c_void_p]),
    "ds_aio_start": (
        c_void_p,
        [c_void_p, c_int, POINTER(c_int), POINTER(c_int), c_int64, c_int64, c_void_p, c_int64, c_int, c_void_p],
    ),
    "ds_aio_wait": (c_int, [c_void_p, c_void_p, c_double]),
    "ds_aio_finish": (None, [c_void_p, POINTER(_Failure)]),
    "ds_aio_busy_s": (c_double, [c_void_p]),
    "ds_aio_inject": (None, [c_void_p, c_int, c_int]),
    "ds_aio_checksum": (c_uint64, [c_void_p, c_int64]),
}


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The native library with the signatures of its `ds_aio_` functions; None where the package has none."""
    found = native_library()
    if found is not None:
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
    return found


@final
class NativeTicket:
    """A request under way in a NativeQueue."""

    def __init__(self, queue: NativeQueue, request: Request, handle: int) -> None:
        self._queue, self._request, self._handle = queue, request, handle
        self._lock = threading.Lock()
        self.failure: Failure | None = None
        self._is_done = False

    @property
    def is_done(self) -> bool:
        """Whether the outcome is there."""
        return self.wait(0.0)

    def wait(self, timeout_s: float) -> bool:
        """Wait for the outcome; False when it is not there after that time."""
        with self._lock:
            if not self._is_done and self._queue.library.ds_aio_wait(self._queue.handle, self._handle, timeout_s):
                self._finish()
            return self._is_done

    def _finish(self) -> None:
        failure = _Failure()
        self._queue.library.ds_aio_finish(self._handle, ctypes.byref(failure))
        kind = KINDS[failure.kind]
        if kind is not None:
            file = self._request.files[failure.file]
            self.failure = Failure(kind, failure.errno, file, failure.offset, failure.expected, failure.got)
        self._is_done = True
        self._queue.forget(self)


@final
class NativeQueue:
    """Carries requests out in `csrc/aio.cpp`."""

    def __init__(self, aio: AioConfig, means: Means = Means.AUTO) -> None:
        """Open it. Raises DeepSpeedError where the library, or the means that is asked for, does not exist."""
        found = library()
        if found is None:
            raise DeepSpeedError(f"aio: {means.name.lower()} needs the package's native library, which was not built.")
        self.library = found
        taken, error = c_int(means), c_int(0)
        handle = found.ds_aio_open(
            ctypes.byref(taken),
            aio.queue_depth,
            aio.intra_op_parallelism,
            -(-aio.block_size // CHECKED) * CHECKED,
            aio.single_submit,
            aio.overlap_events,
            ctypes.byref(error),
        )
        if not handle:
            raise DeepSpeedError(
                f"aio: {means.name.lower()} with queue_depth {aio.queue_depth} and intra_op_parallelism "
                f"{aio.intra_op_parallelism} is refused here: {os.strerror(error.value)}.\n"
                "  Use less of both, or leave the means to be chosen."
            )
        self.handle: int | None = handle
        self.means = Means(taken.value)
        self._pid = os.getpid()
        self._tickets: set[NativeTicket] = set()
        self._busy_s = 0.0

    @property
    def busy_s(self) -> float:
        """Seconds in which at least one request was under way."""
        return self.library.ds_aio_busy_s(self.handle) if self.handle is not None else self._busy_s

    def start(self, request: Request) -> NativeTicket:
        """Begin; returns at once."""
        if self.handle is None or self._pid != os.getpid():
            raise DeepSpeedError("aio: this queue was closed, or made by the process that forked this one.")
        num = len(request.files)
        handle = self.library.ds_aio_start(
            self.handle,
            num,
            (c_int * num)(*(file.direct_fd for file in request.files)),
            (c_int * num)(*(file.fd for file in request.files)),
            request.stripe_nbytes,
            request.offset,
            request.address,
            request.nbytes,
            request.is_write,
            None if request.checksums is None else request.checksums.ctypes.data,
        )
        if not handle:
            raise MemoryError("aio: no memory for a request")
        ticket = NativeTicket(self, request, handle)
        self._tickets.add(ticket)
        return ticket

    def forget(self, ticket: NativeTicket) -> None:
        """It is done: its memory is its owner's again."""
        self._tickets.discard(ticket)

    def inject(self, fault: Fault, after: int = 0) -> None:
        """For tests: let this befall a piece, after that many others. Once."""
        self.library.ds_aio_inject(self.handle, fault, after)

    def close(self) -> None:
        """Wait for what is under way, then end the threads. Again, or in a forked child, is nothing."""
        if self.handle is None or self._pid != os.getpid():
            return
        while self._tickets:
            next(iter(self._tickets)).wait(1.0)
        self._busy_s = self.busy_s
        handle, self.handle = self.handle, None
        self.library.ds_aio_close(handle)
