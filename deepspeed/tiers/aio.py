"""Asynchronous reads and writes of whole tensors: what `AsyncIOBuilder().load()` returns, and `deepspeed.ops.aio`.

For people who move tensors between files and memory themselves; the nvme tier uses `nvme.py`. Names, arguments, defaults
and return values are those of the original's `aio_handle`; here a failure raises TierError, naming file, offset, expected and
got, where the original prints and returns -1.

The idea: a call is one request to an I/O queue, which cuts it into `block_size` pieces and keeps `queue_depth` of them in
flight on each of `intra_op_parallelism` threads. Tensors on a device pass through a page-aligned copy on the CPU.
"""

from __future__ import annotations

import os
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from deepspeed.accelerator import get_accelerator
from deepspeed.config.storage import AioConfig
from deepspeed.tiers.block_file import BlockFile
from deepspeed.tiers.buffers import aligned_buffer
from deepspeed.tiers.io_queue import open_queue
from deepspeed.tiers.pieces import PAGE
from deepspeed.tiers.request import IoQueue, Means, Request, Ticket
from deepspeed.utils.errors import TierError
from deepspeed.utils.logging import current_rank

POLL_S = 0.2
"""Between looks at the signals while waiting, so that Ctrl-C works."""


@dataclass(slots=True)
class _Operation:
    """One call's request, and what belongs to it until it is done."""

    ticket: Ticket
    file: BlockFile
    tensor: Tensor
    host: Tensor
    offset: int
    is_write: bool
    is_validated: bool

    def finish(self) -> None:
        """Wait, check, copy to the device; raises TierError. The file is closed either way."""
        try:
            while not self.ticket.wait(POLL_S):
                pass
            failure = self.ticket.failure
            if failure is not None:
                why = os.strerror(failure.errno) if failure.kind == "os" else "the file ends there"
                raise _error(
                    f"{'writing' if self.is_write else 'reading'} {self.file.path} at offset {failure.offset}",
                    f"expected {failure.expected} bytes, got {failure.got}: {why}",
                    "See that the file is whole, and the disk healthy and not full.",
                )
            if self.is_validated:
                self._validate()
            if not self.is_write and self.host is not self.tensor:
                self.tensor.copy_(self.host)
        finally:
            self.file.close()

    def _validate(self) -> None:
        """Compare memory and file, read again in the ordinary way."""
        expected = _bytes_of(self.host)
        path, at = self.file.path, 0
        with open(path, "rb", buffering=0) as file:
            file.seek(self.offset)
            while at < expected.nbytes:
                got = file.read(min(1 << 24, expected.nbytes - at))
                piece = expected[at : at + len(got)]
                if not got or not torch.equal(torch.frombuffer(bytearray(got), dtype=torch.uint8), piece):
                    raise _error(
                        f"validating {path} from offset {self.offset + at}",
                        f"{len(got)} bytes read in the ordinary way are not those of the tensor",
                        "Somebody else writes this file, or the disk is broken.",
                    )
                at += len(got)


@final
class aio_handle:  # noqa: N801 - the contract's name
    """Reads and writes contiguous tensors. Threads may share it; `wait` is for all that is under way."""

    def __init__(
        self,
        block_size: int = 1024 * 1024,
        queue_depth: int = 128,
        single_submit: bool = False,
        overlap_events: bool = False,
        intra_op_parallelism: int = 1,
        *,
        means: Means = Means.AUTO,
    ) -> None:
        """`means`, which the original does not have, says how the operating system is asked."""
        self._aio = AioConfig(
            block_size=block_size,
            queue_depth=queue_depth,
            single_submit=single_submit,
            overlap_events=overlap_events,
            intra_op_parallelism=intra_op_parallelism,
        )
        self._queue: IoQueue = open_queue(self._aio, means)
        weakref.finalize(self, self._queue.close)
        self._lock = threading.Lock()
        self._pending: list[_Operation] = []
        self._locked: dict[int, int] = {}

    def get_block_size(self) -> int:
        """Bytes of a piece."""
        return self._aio.block_size

    def get_queue_depth(self) -> int:
        """Pieces in flight per thread."""
        return self._aio.queue_depth

    def get_single_submit(self) -> bool:
        """Whether pieces are submitted one by one."""
        return self._aio.single_submit

    def get_overlap_events(self) -> bool:
        """Whether pieces are submitted before the last ones are complete."""
        return self._aio.overlap_events

    def get_intra_op_parallelism(self) -> int:
        """Threads that share a request."""
        return self._aio.intra_op_parallelism

    def get_alignment(self) -> int:
        """Bytes: memory, offsets and sizes that are multiples of it move without a copy."""
        return PAGE

    def read(self, buffer: Tensor, filename: str | Path, validate: bool = False, file_offset: int = 0) -> int:
        """Fill the buffer from the file; returns 1."""
        return self.pread(buffer, filename, validate, False, file_offset)

    def write(self, buffer: Tensor, filename: str | Path, validate: bool = False, file_offset: int = 0) -> int:
        """Write the buffer to the file; returns 1."""
        return self.pwrite(buffer, filename, validate, False, file_offset)

    def pread(
        self,
        buffer: Tensor,
        filename: str | Path | int,
        validate: bool = False,
        async_op: bool = False,
        file_offset: int = 0,
    ) -> int:
        """Fill the buffer: now, returning 1, or by the next `wait`, returning 0."""
        return self._run(buffer, filename, validate, async_op, file_offset, is_write=False)

    def pwrite(
        self,
        buffer: Tensor,
        filename: str | Path | int,
        validate: bool = False,
        async_op: bool = False,
        file_offset: int = 0,
    ) -> int:
        """Write the buffer: now, returning 1, or by the next `wait`, returning 0. The file is made, never truncated."""
        return self._run(buffer, filename, validate, async_op, file_offset, is_write=True)

    def sync_pread(self, buffer: Tensor, filename: str | Path, file_offset: int = 0) -> int:
        """Fill the buffer from the file; returns 1."""
        return self.pread(buffer, filename, False, False, file_offset)

    def sync_pwrite(self, buffer: Tensor, filename: str | Path, file_offset: int = 0) -> int:
        """Write the buffer to the file; returns 1."""
        return self.pwrite(buffer, filename, False, False, file_offset)

    def async_pread(self, buffer: Tensor, filename: str | Path | int, file_offset: int = 0) -> int:
        """Begin to fill the buffer, from a file or a descriptor; returns 0. Both are borrowed until `wait`."""
        return self.pread(buffer, filename, False, True, file_offset)

    def async_pwrite(self, buffer: Tensor, filename: str | Path | int, file_offset: int = 0) -> int:
        """Begin to write the buffer, to a file or a descriptor; returns 0. Both are borrowed until `wait`."""
        return self.pwrite(buffer, filename, False, True, file_offset)

    def wait(self) -> int:
        """Wait for every asynchronous operation; returns how many there were. Raises the first one's TierError."""
        with self._lock:
            pending, self._pending = self._pending, []
        error: TierError | None = None
        for operation in pending:
            try:
                operation.finish()
            except TierError as failed:
                error = error or failed
        if error is not None:
            raise error
        return len(pending)

    def new_cpu_locked_tensor(self, num_elem: int, example_tensor: Tensor) -> Tensor:
        """A page-aligned CPU tensor [num_elem] of the example's dtype, locked in memory as far as limits allow."""
        tensor = aligned_buffer(num_elem * example_tensor.element_size(), is_locked=True).view(example_tensor.dtype)
        get_accelerator().register_host_memory(tensor)
        with self._lock:
            self._locked[tensor.data_ptr()] = tensor.nbytes
        return tensor

    def free_cpu_locked_tensor(self, locked_tensor: Tensor) -> bool:
        """End the tensor's pinning; False if it is not from `new_cpu_locked_tensor`. Its memory goes with its last reference."""
        with self._lock:
            is_known = self._locked.pop(locked_tensor.data_ptr(), None) is not None
        if is_known:
            get_accelerator().unpin_memory(locked_tensor)
        return is_known

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether the tensor lies in page-locked memory, of this handle or of torch."""
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        with self._lock:
            is_ours = any(at <= begin and end <= at + nbytes for at, nbytes in self._locked.items())
        return is_ours or bool(tensor.is_pinned())

    def _run(
        self, tensor: Tensor, target: str | Path | int, validate: bool, is_async: bool, offset: int, *, is_write: bool
    ) -> int:
        operation = self._start(tensor, target, validate, offset, is_write)
        if not is_async:
            operation.finish()
            return 1
        with self._lock:
            self._pending.append(operation)
        return 0

    def _start(
        self, tensor: Tensor, target: str | Path | int, validate: bool, offset: int, is_write: bool
    ) -> _Operation:
        verb = "writing" if is_write else "reading"
        if not tensor.is_contiguous():
            raise _error(f"{verb} {target}", "the tensor is not contiguous", "Pass tensor.contiguous().")
        if offset < 0:
            raise _error(
                f"{verb} {target}", f"file_offset {offset} is negative", "Offsets count from the file's begin."
            )
        file = _open(target, is_write)
        try:
            if not is_write:
                _check_size(file, offset, tensor.nbytes, is_exact=validate)
            host = tensor
            if tensor.device.type != "cpu":
                host = aligned_buffer(tensor.nbytes).view(tensor.dtype).reshape(tensor.shape)
                if is_write:
                    host.copy_(tensor)
            request = Request(
                files=(file,),
                offset=offset,
                address=host.data_ptr(),
                nbytes=host.nbytes,
                is_write=is_write,
                keeps=host,
            )
            return _Operation(self._queue.start(request), file, tensor, host, offset, is_write, validate)
        except BaseException:
            file.close()
            raise


def aio_read(
    buffer: Tensor,
    filename: str | Path,
    block_size: int,
    queue_depth: int,
    single_submit: bool,
    overlap_events: bool,
    validate: bool,
) -> int:
    """Fill a buffer from a file by a handle of its own; returns 1."""
    return aio_handle(block_size, queue_depth, single_submit, overlap_events).read(buffer, filename, validate)


def aio_write(
    buffer: Tensor,
    filename: str | Path,
    block_size: int,
    queue_depth: int,
    single_submit: bool,
    overlap_events: bool,
    validate: bool,
) -> int:
    """Write a buffer to a file by a handle of its own; returns 1."""
    return aio_handle(block_size, queue_depth, single_submit, overlap_events).write(buffer, filename, validate)


def deepspeed_memcpy(dest: Tensor, src: Tensor) -> int:
    """Copy bytes between CPU tensors of one size; returns 0."""
    if dest.nbytes != src.nbytes or not (dest.is_contiguous() and src.is_contiguous()):
        raise _error(
            "deepspeed_memcpy",
            f"the destination has {dest.nbytes} bytes, the source {src.nbytes}",
            "Pass contiguous tensors of one size.",
        )
    _bytes_of(dest).copy_(_bytes_of(src))
    return 0


def _open(target: str | Path | int, is_write: bool) -> BlockFile:
    try:
        if isinstance(target, int):
            return BlockFile.of_fd(target)
        return BlockFile(target, os.O_WRONLY | os.O_CREAT if is_write else os.O_RDONLY)
    except OSError as error:
        name = f"descriptor {target}" if isinstance(target, int) else target
        verb = "writing" if is_write else "reading"
        raise _error(f"{verb} {name}", str(error.strerror), "Check the path and its permissions.") from error


def _check_size(file: BlockFile, offset: int, nbytes: int, *, is_exact: bool) -> None:
    there = max(os.fstat(file.fd).st_size - offset, 0)
    if there < nbytes or (is_exact and there != nbytes):
        raise _error(
            f"reading {file.path} at offset {offset}",
            f"expected {nbytes} bytes, the tensor's size, got {there}",
            "Pass a tensor as long as what the file holds from there on.",
        )


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def _error(what: str, problem: str, cure: str) -> TierError:
    return TierError(f"[rank {current_rank()}] {what}: {problem}.\n  {cure}")
