"""The nvme tier: named blocks of bytes in a rank's swap files, written and read while the caller computes.

`deepspeed.zero` keeps optimizer states and parameters here; the store calls the folder and the I/O queue.

The store's space is one logical sequence of bytes, striped over a file per path. A key owns an extent of it, reserved on
disk before anything is written, so that a full disk is known up front and not in the middle of a step. Every 64 KiB
(`CHECKED`) have a checksum, kept in memory, made and compared by the I/O threads: what is read is what was last written,
or an error. Transfers of whole 64 KiB go straight between the tensor and the disk; a first or last part of one goes
through a buffer of that size.

Invariant: transfers of one key that overlap, one of them a put, happen in the order in which they were started. What a
failed put should have written cannot be read.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from deepspeed.accelerator import get_accelerator
from deepspeed.config.storage import AioConfig
from deepspeed.tiers.block_file import BlockFile
from deepspeed.tiers.buffers import aligned_buffer
from deepspeed.tiers.direct import DirectFiles, open_direct
from deepspeed.tiers.io_queue import open_queue
from deepspeed.tiers.request import CHECKED, Failure, IoQueue, Means, Request, Ticket
from deepspeed.tiers.swap_folder import SwapFolder
from deepspeed.utils.errors import TierError
from deepspeed.utils.logging import logger
from deepspeed.utils.waits import OFFLOAD, OFFLOAD_S, RESTING

NEVER, FAILED = 0, 1
"""Instead of a checksum: nothing was written yet, or a write did not succeed. No checksum has these values."""
UNCHECKED = 2**64 - 1
"""The same: written by a device, whose bytes no processor saw (`direct`)."""
POLL_S = 0.2
"""Between looks at the signals while waiting, so that Ctrl-C works."""
SLOW_S = 60.0
"""After that long a wait for one transfer says so, once."""


@dataclass(kw_only=True)
class StoreStats:
    """What went through a store since it was made; plain numbers, to subtract from each other."""

    bytes_read: int = 0
    bytes_written: int = 0
    seconds_waiting: float = 0.0
    """Host time blocked in `Transfer.wait`, or on an overlapping transfer."""
    seconds_busy: float = 0.0
    """Time in which the disk had something to do for us."""


@dataclass(frozen=True, slots=True)
class _Extent:
    start: int
    """In the logical space; a multiple of CHECKED."""
    nbytes: int
    checksums: np.ndarray
    """One per CHECKED bytes, or NEVER, or FAILED."""

    def checksums_of(self, start: int, nbytes: int) -> np.ndarray:
        return self.checksums[start // CHECKED : -(-(start + nbytes) // CHECKED)]


@dataclass(slots=True)
class _Part:
    """One request of a transfer, and for a part of CHECKED bytes the copy out of its buffer."""

    ticket: Ticket
    nbytes: int
    request: Request
    source: Tensor | None = None
    target: Tensor | None = None


@final
class Transfer:
    """Bytes under way. The tensor is borrowed until `wait` returns."""

    def __init__(self, store: NvmeStore, key: str, begin: int, end: int, is_write: bool, tensor: Tensor) -> None:
        self._store = store
        self._key, self._begin, self._end, self._is_write = key, begin, end, is_write
        self._tensor: Tensor | None = tensor
        self._parts: list[_Part] = []
        self._error: TierError | None = None
        self._has_ended = False

    @property
    def is_done(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        return self._has_ended or all(part.ticket.is_done for part in self._parts)

    def wait(self) -> None:
        """Return when the bytes are there; raise TierError, naming rank, file, offset and cure, if they cannot be.

        Again is nothing, or the same error.
        """
        self._await_outcome()
        if self._error is not None:
            raise self._error

    def _await_outcome(self) -> None:
        """Wait for the outcome and keep it."""
        if self._has_ended:
            return
        begun = time.monotonic()
        try:
            for part in self._parts:
                while not part.ticket.wait(POLL_S):
                    if time.monotonic() - begun > SLOW_S and not self._store.has_warned:
                        self._store.has_warned = True
                        logger.warning("[rank %d] waiting for %s for %g s", self._store.rank, self._what(), SLOW_S)
        finally:
            self._store.count_wait(
                time.monotonic() - begun, "write" if self._is_write else "read", self._end - self._begin
            )
        for part in self._parts:
            if part.ticket.failure is not None:
                self._error = self._error or self._store.error_of(part.ticket.failure, self._what())
                if self._is_write:
                    part.request.checksums[:] = FAILED
            elif part.target is not None and part.source is not None:
                part.target.copy_(part.source)
        self._has_ended, self._tensor, self._parts = True, None, []
        self._store.forget(self)

    def _what(self) -> str:
        verb = "writing" if self._is_write else "reading"
        return f"{verb} bytes {self._begin} to {self._end} of {self._key!r}"

    def _conflicts(self, key: str, begin: int, end: int, is_write: bool) -> bool:
        """Whether the two touch the same CHECKED bytes and one of them writes."""
        return (
            (is_write or self._is_write)
            and key == self._key
            and begin // CHECKED < -(-self._end // CHECKED)
            and self._begin // CHECKED < -(-end // CHECKED)
        )


@final
class NvmeStore:
    """Keys and their bytes in one rank's swap folder. For one thread at a time."""

    def __init__(self, folder: SwapFolder, aio: AioConfig, *, means: Means = Means.AUTO) -> None:
        """Open the files and the queue; `close` gives both back, and the folder."""
        self.rank = folder.rank
        self.folder = folder
        self.has_warned = False
        self._stats = StoreStats()
        self._stripe_nbytes = -(-aio.block_size // CHECKED) * CHECKED
        self._extents: dict[str, _Extent] = {}
        self._numbers = itertools.count()
        self._reserved = 0
        self._free: list[tuple[int, int]] = []
        """(start, bytes) of extents that were given up, for keys to come."""
        self._in_flight: list[Transfer] = []
        self._pinned: list[Tensor] = []
        self._files: list[BlockFile] = []
        self._direct: list[DirectFiles] = []
        """The same files for the device, where it moves bytes by itself; else none."""
        self._queue: IoQueue = open_queue(aio, means)
        self._finalizer = weakref.finalize(
            self, _close, os.getpid(), self._queue, self._files, folder, self._pinned, self._direct
        )
        for path in folder.folders:
            try:
                self._files.append(BlockFile(path / "data", os.O_RDWR | os.O_CREAT | os.O_EXCL, mode=0o600))
            except OSError as error:
                self.close()
                raise TierError(f"[rank {self.rank}] {path / 'data'}: {error.strerror}.\n  {_CURE}") from error
        if any(file.direct_fd < 0 for file in self._files):
            logger.info("swap files go through the page cache: %s has no direct I/O", folder.folders[0])
        if aio.use_gds and (direct := open_direct(self._files, self._stripe_nbytes, aio.queue_depth)):
            self._direct.append(direct)

    @property
    def means(self) -> Means:
        """How the operating system is asked."""
        return self._queue.means

    @property
    def stats(self) -> StoreStats:
        """What went through so far."""
        self._stats.seconds_busy = self._queue.busy_s
        return self._stats

    def count_wait(self, seconds: float, op: str, nbytes: int) -> None:
        """The host was blocked so long for a transfer; told to whoever reports steps, too."""
        busy_before = self._stats.seconds_busy
        self.stats.seconds_waiting += seconds
        OFFLOAD.add(seconds, op, nbytes)
        OFFLOAD_S["disk"] += self._stats.seconds_busy - busy_before

    def moves(self, device: torch.device) -> bool:
        """Whether tensors of this device can be put and got."""
        return device.type == "cpu" or any(direct.device_type == device.type for direct in self._direct)

    def new_key(self, kind: str) -> str:
        """A key that nobody has, which starts with `kind`."""
        return f"{kind}-{next(self._numbers)}"

    def reserve(self, key: str, nbytes: int) -> None:
        """Take disk space for a key, now. Raises TierError if there is not enough, or the key has another size already."""
        self._check_process()
        extent = self._extents.get(key)
        if extent is not None:
            if extent.nbytes != nbytes:
                raise TierError(
                    f"[rank {self.rank}] {key!r} has {extent.nbytes} bytes reserved, not {nbytes}.\n"
                    "  A key keeps its size; use another key."
                )
            return
        self.folder.check()
        num_checked = -(-nbytes // CHECKED)
        start = self._take_free(num_checked * CHECKED)
        if start is None:
            self._grow(self._reserved + num_checked * CHECKED, key, nbytes)
            start = self._reserved
            self._reserved += num_checked * CHECKED
            RESTING["nvme"] = RESTING.get("nvme", 0) + num_checked * CHECKED
        self._extents[key] = _Extent(start, nbytes, np.zeros(num_checked, dtype=np.uint64))

    def remove(self, key: str) -> None:
        """Give up a key; its space is used for keys to come. Waits for what is under way."""
        if not self._finalizer.alive:
            return
        for transfer in [*self._in_flight]:
            if transfer._key == key:
                transfer._await_outcome()
        extent = self._extents.pop(key, None)
        if extent is not None and extent.nbytes:
            self._free.append((extent.start, -(-extent.nbytes // CHECKED) * CHECKED))

    def _take_free(self, nbytes: int) -> int | None:
        """The start of space that was given up, the tightest that fits; what is left of it stays free."""
        fitting = [space for space in self._free if space[1] >= nbytes > 0]
        if not fitting:
            return None
        start, size = min(fitting, key=lambda space: space[1])
        self._free.remove((start, size))
        if size > nbytes:
            self._free.append((start + nbytes, size - nbytes))
        return start

    def nbytes(self, key: str) -> int:
        """What is reserved for a key. Raises TierError if nothing is."""
        return self._extent(key).nbytes

    def start_put(self, key: str, tensor: Tensor, offset_bytes: int = 0) -> Transfer:
        """Begin to write a contiguous tensor on the CPU (or see `moves`) into a key's bytes, reserving them if the key is new."""
        if key not in self._extents:
            self.reserve(key, offset_bytes + tensor.nbytes)
        return self._start(key, tensor, offset_bytes, is_write=True)

    def start_get(self, key: str, into: Tensor, offset_bytes: int = 0) -> Transfer:
        """Begin to read a key's bytes into a contiguous tensor on the CPU (or see `moves`). They must have been put."""
        return self._start(key, into, offset_bytes, is_write=False)

    def buffer(self, nbytes: int, *, pin_memory: bool = False) -> Tensor:
        """Page-aligned uint8 zeros, which move without a copy; page-locked for the device if asked, until `close`."""
        tensor = aligned_buffer(nbytes)
        if pin_memory and nbytes and get_accelerator().register_host_memory(tensor):
            self._pinned.append(tensor)
        return tensor

    def close(self) -> None:
        """Wait for what is under way, remove the files and give the folder's locks back. Again is nothing."""
        for transfer in [*self._in_flight]:
            transfer._await_outcome()
        if self._finalizer.alive:
            RESTING["nvme"] = RESTING.get("nvme", 0) - self._reserved
        self._finalizer()

    def _start(self, key: str, tensor: Tensor, offset: int, *, is_write: bool) -> Transfer:
        self._check_process()
        extent = self._extent(key)
        end = offset + tensor.nbytes
        verb = "put" if is_write else "get"
        if not self.moves(tensor.device) or not tensor.is_contiguous():
            layout = "contiguous" if tensor.is_contiguous() else "not contiguous"
            raise TierError(
                f"[rank {self.rank}] {verb} {key!r}: the tensor is on {tensor.device}, {layout}.\n"
                "  Use a contiguous tensor on the CPU; NvmeStore.buffer() makes one."
            )
        if offset < 0 or end > extent.nbytes:
            raise TierError(
                f"[rank {self.rank}] {verb} {key!r}: bytes {offset} to {end} are outside of its {extent.nbytes}.\n"
                "  Reserve the key with its full size."
            )
        self.folder.check()
        for other in [*self._in_flight]:
            if other._conflicts(key, offset, end, is_write):
                other._await_outcome()
        transfer = Transfer(self, key, offset, end, is_write, tensor)
        if not tensor.nbytes:
            return transfer
        if not is_write and (extent.checksums_of(offset, tensor.nbytes) <= FAILED).any():
            raise TierError(
                f"[rank {self.rank}] get {key!r}: bytes {offset} to {end} were never put, or their put failed.\n"
                "  Put them first."
            )
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        self._in_flight.append(transfer)
        if tensor.device.type != "cpu":
            self._add_direct(transfer, extent, offset, flat, is_write)
            return transfer
        at = offset
        while at < end:
            begin, stop = at // CHECKED * CHECKED, end // CHECKED * CHECKED
            if at == begin < stop:
                piece = flat[at - offset : stop - offset]
                self._add(transfer, extent, at, piece, is_write)
            else:
                stop = min(end, begin + CHECKED)
                piece = flat[at - offset : stop - offset]
                self._add_part(transfer, extent, at, piece, is_write)
            at = stop
        return transfer

    def _add(self, transfer: Transfer, extent: _Extent, start: int, memory: Tensor, is_write: bool) -> _Part:
        """A request for whole CHECKED bytes from `start` of the extent."""
        checksums = extent.checksums_of(start, memory.nbytes)
        request = Request(
            files=tuple(self._files),
            stripe_nbytes=self._stripe_nbytes,
            offset=extent.start + start,
            address=memory.data_ptr(),
            nbytes=memory.nbytes,
            is_write=is_write,
            checksums=checksums if is_write or not (checksums == UNCHECKED).any() else None,
            keeps=memory,
        )
        part = _Part(self._queue.start(request), memory.nbytes, request)
        transfer._parts.append(part)
        if is_write:
            self._stats.bytes_written += memory.nbytes
        else:
            self._stats.bytes_read += memory.nbytes
        return part

    def _add_part(self, transfer: Transfer, extent: _Extent, start: int, piece: Tensor, is_write: bool) -> None:
        """A request for less than CHECKED bytes: through a buffer, after reading its other bytes if they count."""
        begin = start // CHECKED * CHECKED
        buffer = aligned_buffer(CHECKED)
        within = buffer[start - begin : start - begin + piece.nbytes]
        if is_write:
            is_all = start == begin and start + piece.nbytes == min(begin + CHECKED, extent.nbytes)
            if not is_all and extent.checksums_of(begin, 1)[0] != NEVER:
                before = Transfer(self, transfer._key, begin, begin + CHECKED, False, buffer)
                self._add(before, extent, begin, buffer, is_write=False)
                before.wait()
            within.copy_(piece)
        part = self._add(transfer, extent, begin, buffer, is_write)
        if not is_write:
            part.source, part.target = within, piece

    def _add_direct(self, transfer: Transfer, extent: _Extent, start: int, flat: Tensor, is_write: bool) -> None:
        """Requests that the device carries out, of any bytes from `start` of the extent."""
        checksums = extent.checksums_of(start // CHECKED * CHECKED, start % CHECKED + flat.nbytes)
        offset = extent.start + start
        if is_write:
            begin, end = start // CHECKED, (start + flat.nbytes) // CHECKED
            is_lost = checksums == FAILED
            is_lost[-(-start // CHECKED) - begin : end - begin] = False  # written whole now
            checksums[~is_lost] = UNCHECKED
            self._stats.bytes_written += flat.nbytes
        else:
            self._stats.bytes_read += flat.nbytes
        for begin, (ticket, memory) in self._direct[0].start(offset, flat, is_write=is_write):
            request = Request(
                files=tuple(self._files),
                stripe_nbytes=self._stripe_nbytes,
                offset=offset + begin,
                address=memory.data_ptr(),
                nbytes=memory.nbytes,
                is_write=is_write,
                checksums=checksums,
            )
            part = _Part(ticket, memory.nbytes, request)
            target = flat.narrow(0, begin, memory.nbytes)
            if not is_write and memory.data_ptr() != target.data_ptr():
                part.source, part.target = memory, target
            transfer._parts.append(part)

    def _extent(self, key: str) -> _Extent:
        try:
            return self._extents[key]
        except KeyError:
            raise TierError(f"[rank {self.rank}] nothing is stored as {key!r}.\n  Reserve or put it first.") from None

    def _grow(self, nbytes: int, key: str, key_nbytes: int) -> None:
        """Have the files cover `nbytes` of the logical space."""
        per_file = nbytes
        if len(self._files) > 1:
            per_file = -(-nbytes // (self._stripe_nbytes * len(self._files))) * self._stripe_nbytes
        for file in self._files:
            had = os.fstat(file.fd).st_size
            if per_file <= had:
                continue
            disk = os.fstatvfs(file.fd)
            try:
                _allocate(file.fd, had, per_file)
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.ftruncate(file.fd, had)
                raise TierError(
                    f"[rank {self.rank}] {file.path}: {error.strerror} while reserving {key_nbytes} bytes for {key!r}: "
                    f"{per_file - had} more needed in this file of {had}, {disk.f_bavail * disk.f_frsize} free.\n"
                    "  Free space on that disk, name another nvme_path, or offload less."
                ) from error

    def error_of(self, failure: Failure, what: str) -> TierError:
        """What went wrong, as an exception."""
        where = f"[rank {self.rank}] {what}: {failure.file.path}, offset {failure.offset}"
        if failure.kind == "corrupt":
            return TierError(
                f"{where}: the file was changed or damaged since it was written (checksum {failure.got:016x}, expected "
                f"{failure.expected:016x}).\n  Do not go on from here: load the last checkpoint; see to the disk if "
                "nobody touched the file."
            )
        if failure.kind == "short":
            return TierError(
                f"{where}: expected {failure.expected} bytes, got {failure.got}.\n  The file was truncated, or the disk "
                "takes no more; load the last checkpoint with another nvme_path."
            )
        return TierError(
            f"{where}: {os.strerror(failure.errno)} (expected {failure.expected} bytes, got {failure.got}).\n  {_CURE}"
        )

    def forget(self, transfer: Transfer) -> None:
        """It has its outcome."""
        if transfer in self._in_flight:
            self._in_flight.remove(transfer)

    def _check_process(self) -> None:
        if not self._finalizer.alive:
            raise TierError(f"[rank {self.rank}] the store at {self.folder.folders} is closed.")


def _allocate(fd: int, had: int, nbytes: int) -> None:
    """Have the file, of `had` bytes, take `nbytes` on disk, or promise to where the file system cannot allocate ahead."""
    try:
        os.posix_fallocate(fd, had, nbytes - had)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
        disk = os.fstatvfs(fd)
        if nbytes - had > disk.f_bavail * disk.f_frsize:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        os.ftruncate(fd, nbytes)


_CURE = "See that the disk is mounted, healthy and has space left; then load the last checkpoint."


def _close(
    pid: int,
    queue: IoQueue,
    files: list[BlockFile],
    folder: SwapFolder,
    pinned: list[Tensor],
    directs: list[DirectFiles],
) -> None:
    if os.getpid() != pid:
        return  # a forked child: all of it is still the parent's
    queue.close()
    for direct in directs:
        direct.close()
    for file in files:
        file.close()
    folder.close()
    for tensor in pinned:
        get_accelerator().unpin_memory(tensor)


def failures_as_one(by_rank: Mapping[int, str | None]) -> str | None:
    """One message of what failed on which rank, the lowest first; None if nothing did. For ranks that agree to stop."""
    failed = {rank: text for rank, text in sorted(by_rank.items()) if text}
    if not failed:
        return None
    first, *others = failed
    also = f"\n  Also failed: rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others))}." if others else ""
    return failed[first] + also
