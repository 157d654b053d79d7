"""The queue in Python: threads with preadv and pwritev, for installations without the native library.

Opened by `io_queue.py`. The system calls release the GIL, so several are in flight; per piece Python costs tens of
microseconds, which large blocks hide and small ones do not. Checksums are zlib's CRC-32.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import final

from deepspeed.config.storage import AioConfig
from deepspeed.tiers.pieces import PAGE, Piece, cut
from deepspeed.tiers.request import CHECKED, Failure, Fault, Means, Request

MAX_THREADS = 16
"""More reads in flight than this saturate no disk and cost a stack each."""


class _PieceError(Exception):
    def __init__(self, kind: str, errno_: int, offset: int, expected: int, got: int) -> None:
        super().__init__(kind)
        self.kind, self.errno, self.offset, self.expected, self.got = kind, errno_, offset, expected, got


@final
class PythonTicket:
    """A request under way in a PythonQueue."""

    def __init__(self, request: Request, num_pieces: int) -> None:
        self._request: Request | None = request
        self.failure: Failure | None = None
        self._left = num_pieces
        self._done = threading.Event()
        if not num_pieces:
            self._done.set()

    @property
    def is_done(self) -> bool:
        """Whether the outcome is there."""
        return self._done.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the outcome; False when it is not there after that time."""
        return self._done.wait(timeout_s)

    def piece_done(self) -> bool:
        """Whether that was the last one. Called with the queue's lock held."""
        self._left -= 1
        if not self._left:
            self._request = None
            self._done.set()
        return not self._left


@final
class PythonQueue:
    """Carries requests out on threads of its own."""

    means = Means.PYTHON

    def __init__(self, aio: AioConfig) -> None:
        self._block_nbytes = -(-aio.block_size // CHECKED) * CHECKED
        self._pool = ThreadPoolExecutor(
            min(MAX_THREADS, aio.queue_depth * aio.intra_op_parallelism), thread_name_prefix="deepspeed-aio"
        )
        self._lock = threading.Lock()
        self._num_requests, self._since, self._busy_s = 0, 0.0, 0.0
        self._fault, self._fault_after = Fault.NONE, 0

    @property
    def busy_s(self) -> float:
        """Seconds in which at least one request was under way."""
        with self._lock:
            return self._busy_s + (time.monotonic() - self._since if self._num_requests else 0.0)

    def start(self, request: Request) -> PythonTicket:
        """Begin; returns at once."""
        files = len(request.files)
        pieces = list(cut(request.offset, request.nbytes, self._block_nbytes, files, request.stripe_nbytes))
        ticket = PythonTicket(request, len(pieces))
        if pieces:
            with self._lock:
                self._since = self._since if self._num_requests else time.monotonic()
                self._num_requests += 1
        for piece in pieces:
            self._pool.submit(self._run, ticket, request, piece)
        return ticket

    def inject(self, fault: Fault, after: int = 0) -> None:
        """For tests: let this befall a piece, after that many others. Once."""
        self._fault, self._fault_after = fault, after

    def close(self) -> None:
        """Wait for what is under way, then end the threads. Again is nothing."""
        self._pool.shutdown(wait=True)

    def _run(self, ticket: PythonTicket, request: Request, piece: Piece) -> None:
        file = request.files[piece.file_index]
        failure: Failure | None = Failure("os", errno.EIO, file, piece.file_offset, piece.nbytes, 0)
        try:
            with self._lock:
                is_dropped, fault = ticket.failure is not None, self._next_fault()
            if not is_dropped:
                self._move(request, piece, fault)
            failure = None
        except _PieceError as error:
            failure = Failure(error.kind, error.errno, file, error.offset, error.expected, error.got)
        except OSError as error:
            failure = Failure("os", error.errno or errno.EIO, file, piece.file_offset, piece.nbytes, 0)
        finally:  # whatever happened: somebody waits
            with self._lock:
                ticket.failure = ticket.failure or failure
                if ticket.piece_done():
                    self._num_requests -= 1
                    self._busy_s += 0.0 if self._num_requests else time.monotonic() - self._since

    def _next_fault(self) -> Fault:
        if self._fault is Fault.NONE:
            return Fault.NONE
        if self._fault_after:
            self._fault_after -= 1
            return Fault.NONE
        fault, self._fault = self._fault, Fault.NONE
        return fault

    def _move(self, request: Request, piece: Piece, fault: Fault) -> None:
        address = request.address + piece.start
        data = memoryview((ctypes.c_ubyte * piece.nbytes).from_address(address)).cast("B")
        if fault in (Fault.EIO, Fault.ENOSPC):
            raise OSError(errno.EIO if fault is Fault.EIO else errno.ENOSPC, "injected")
        if request.is_write and request.checksums is not None:
            self._note_checksums(request, piece, data)
        file = request.files[piece.file_index]
        is_direct = piece.is_whole_pages and file.direct_fd >= 0
        if is_direct and address % PAGE:
            view = memoryview(mmap.mmap(-1, piece.nbytes))
            if request.is_write:
                view[:] = data
            _transfer(file.direct_fd, file.fd, view, piece, request.is_write, fault)
            if not request.is_write:
                data[:] = view
        else:
            _transfer(file.direct_fd if is_direct else file.fd, file.fd, data, piece, request.is_write, fault)
        if not request.is_write and request.checksums is not None:
            self._compare_checksums(request, piece, data)

    def _note_checksums(self, request: Request, piece: Piece, data: memoryview) -> None:
        for at in range(0, piece.nbytes, CHECKED):
            where = piece.start + at
            request.checksums[where // CHECKED] = checksum(data[at : at + CHECKED], request.offset + where)

    def _compare_checksums(self, request: Request, piece: Piece, data: memoryview) -> None:
        for at in range(0, piece.nbytes, CHECKED):
            where = piece.start + at
            expected = int(request.checksums[where // CHECKED])
            got = checksum(data[at : at + CHECKED], request.offset + where)
            if got != expected:
                raise _PieceError("corrupt", 0, piece.file_offset + at, expected, got)


def checksum(data: memoryview, offset: int) -> int:
    """Of CHECKED bytes that belong at this logical offset; never 0 or 1."""
    return zlib.crc32(data, zlib.crc32(offset.to_bytes(8, "little"))) | 1 << 32


def _transfer(fd: int, buffered_fd: int, data: memoryview, piece: Piece, is_write: bool, fault: Fault) -> None:
    """All of it, however many calls that takes; what is left after a short one goes through the page cache."""
    moved = 0
    while moved < piece.nbytes:
        rest = data[moved : (moved + piece.nbytes) // 2] if fault in (Fault.SHORT, Fault.END) else data[moved:]
        try:
            if fault is Fault.REFUSE and fd != buffered_fd:
                raise OSError(errno.EINVAL, "injected")
            now = (os.pwritev if is_write else os.preadv)(fd, [rest], piece.file_offset + moved)
        except OSError as error:
            if error.errno != errno.EINVAL or fd == buffered_fd:
                raise
            fd = buffered_fd
            continue
        moved += now
        if not now or (fault is Fault.END and moved < piece.nbytes):
            raise _PieceError("short", 0, piece.file_offset, piece.nbytes, moved)
        fd, fault = buffered_fd, fault if fault is Fault.FLIP else Fault.NONE
    if fault is Fault.FLIP and not is_write:
        data[0] ^= 1
