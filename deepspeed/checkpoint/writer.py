"""Writes one safetensors file through staging blocks: direct I/O, digests on the way, nothing in memory but the blocks.

Used by `save` and `export`. `fill` runs in the caller's thread and returns when every byte is in a block; `finish` may
run in another one and returns when every byte is durable.

    tensors --copy--> block --digest, pwrite (O_DIRECT)--> file          blocks are written out of order, by two threads

Why direct I/O: on the test machine (ext4 on a virtual disk) two threads writing 4 MiB blocks past the page cache reach
1.6 to 2.0 GB/s, through it and fsynced 0.2 to 1.5 GB/s.

Invariant: the file has its final size from the start, so a full disk is noticed before anything is copied.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deepspeed.checkpoint.container import PAGE, Layout
from deepspeed.checkpoint.digest import digest_function
from deepspeed.checkpoint.files import naming
from deepspeed.checkpoint.staging import BLOCK, Block, Staging
from deepspeed.utils.errors import CheckpointError

NUM_WRITERS = 2
"""Threads per file: one request in the disk's queue while the next is digested."""

Reads = Callable[[int, int], Tensor]
"""(first element, number of elements) -> a 1-D CPU tensor of them, which the caller will not write to."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What the manifest says about a file."""

    nbytes: int
    digests: tuple[str, ...]
    """One per block of BLOCK bytes, in order."""


class FileWriter:
    """Writes `layout` to `path`; `source_of[name]` reads each tensor's elements."""

    def __init__(self, path: Path, layout: Layout, staging: Staging, algorithm: str) -> None:
        self.path = path
        self._layout = layout
        self._staging = staging
        self._digest = digest_function(algorithm)
        self._error: BaseException | None = None
        self._digests: list[str] = [""] * -(-layout.nbytes // BLOCK)
        self._fd = _open_for_writing(path)
        try:
            if layout.nbytes:
                _take_space(self._fd, path, layout.nbytes)
        except BaseException:
            os.close(self._fd)
            raise
        self._threads = ThreadPoolExecutor(NUM_WRITERS, thread_name_prefix="checkpoint-write")
        self._holds_back = False
        self._held: deque[tuple[Block, int, int]] = deque()

    def fill(self, source_of: dict[str, Reads]) -> None:
        """Copy everything into staging blocks, waiting for free ones. Errors of the disk are raised by `finish`.

        Where there are blocks for all of it nothing is written before all of it is copied: the caller is waiting, and
        digests and copies want the same cores.
        """
        self._holds_back = len(self._digests) < self._staging.num_blocks
        block, used, index = self._staging.take(), 0, 0
        try:
            for data in self._bytes(source_of):
                while data.numel() and self._error is None:
                    count = min(data.numel(), BLOCK - used)
                    block.tensor.narrow(0, used, count).copy_(data.narrow(0, 0, count))
                    data, used = data.narrow(0, count, data.numel() - count), used + count
                    if used == BLOCK:
                        self._submit(block, used, index)
                        block, used, index = self._staging.take(), 0, index + 1
        except BaseException:
            for unused in (block, *(held for held, _, _ in self._held)):
                self._staging.give_back(unused)
            raise
        self._submit(block, used, index)
        self._holds_back = False
        for _ in range(NUM_WRITERS if self._held else 0):
            self._threads.submit(self._write_held)

    def _bytes(self, source_of: dict[str, Reads]) -> Iterator[Tensor]:
        """The file's bytes in order, as tensors of at most a block or so."""
        yield torch.frombuffer(bytearray(self._layout.header), dtype=torch.uint8)
        for name, entry in sorted(self._layout.entries.items(), key=lambda item: item[1].start):
            numel = torch.Size(entry.shape).numel()
            itemsize = (entry.stop - entry.start) // max(1, numel)
            for start in range(0, numel, BLOCK // max(1, itemsize)):
                count = min(numel - start, BLOCK // itemsize)
                yield source_of[name](start, count).contiguous().view(torch.uint8)

    def _submit(self, block: Block, used: int, index: int) -> None:
        if used == 0:
            self._staging.give_back(block)
        elif self._holds_back:
            self._held.append((block, used, index))
        else:
            self._threads.submit(self._write, block, used, index)

    def _write_held(self) -> None:
        with contextlib.suppress(IndexError):  # until none is left
            while True:
                self._write(*self._held.popleft())

    def _write(self, block: Block, used: int, index: int) -> None:
        try:
            if self._error is None:
                self._digests[index] = self._digest(block.memory[:used])
                # Direct I/O moves whole pages; `finish` cuts the last one to size.
                with naming(self.path):
                    _write_all(self._fd, block.memory[: -(-used // PAGE) * PAGE], index * BLOCK)
        except BaseException as error:
            self._error = self._error or error
        finally:
            self._staging.give_back(block)

    def finish(self) -> FileRecord:
        """Wait until the file is whole and durable. Raises the first error of any write."""
        try:
            self._threads.shutdown(wait=True)
            if self._error is not None:
                raise self._error
            with naming(self.path):
                os.ftruncate(self._fd, self._layout.nbytes)
                os.fsync(self._fd)
        finally:
            os.close(self._fd)
        return FileRecord(self._layout.nbytes, tuple(self._digests))

    def abandon(self) -> None:
        """Stop writing and leave the file as it is; for the way out after another error."""
        self._error = self._error or RuntimeError("abandoned")
        self._threads.shutdown(wait=True)
        os.close(self._fd)


def write_tensors(
    path: Path, layout: Layout, source_of: dict[str, Reads], staging: Staging, algorithm: str
) -> FileRecord:
    """Write a file from start to end."""
    writer = FileWriter(path, layout, staging, algorithm)
    try:
        writer.fill(source_of)
    except BaseException:
        writer.abandon()
        raise
    return writer.finish()


def _open_for_writing(path: Path) -> int:
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        path.unlink(missing_ok=True)
        return os.open(path, flags, 0o666)


def _take_space(fd: int, path: Path, nbytes: int) -> None:
    """Give a file its size. Raises CheckpointError where the disk has no room for it."""
    try:
        with naming(path):
            os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        stat = os.fstatvfs(fd)
        raise CheckpointError(
            f"{error}: it takes {nbytes} bytes, of which {stat.f_bavail * stat.f_frsize} were left.\n"
            "  Make room; checkpoint.keep_last_n removes old checkpoints, but only once the new one is whole."
        ) from error


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def record_of(data: bytes, algorithm: str) -> FileRecord:
    """The record of a small file written elsewhere."""
    digest = digest_function(algorithm)
    view = memoryview(data)
    return FileRecord(len(data), tuple(digest(view[start : start + BLOCK]) for start in range(0, len(data), BLOCK)))
