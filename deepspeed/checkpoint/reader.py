"""Reads intervals of files in whole blocks, checking every block's digest before a byte of it is used.

Used by `store`. Threads read and digest blocks ahead; the caller's thread copies what was asked for out of them, in the
order of the file. Memory: the staging blocks, whatever the size of the file.

Invariant: a byte that reaches a sink was covered by a digest that matched.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deepspeed.checkpoint.container import PAGE
from deepspeed.checkpoint.digest import Digest
from deepspeed.checkpoint.files import open_plain
from deepspeed.checkpoint.staging import BLOCK, Block, Staging
from deepspeed.checkpoint.writer import FileRecord
from deepspeed.utils.errors import CheckpointError, DamagedError

NUM_READERS = 2


@dataclass(frozen=True)
class ByteRange:
    """Bytes [start, stop) of a file, for `sink(offset, bytes)`: bytes [1-D uint8], offset counted from `start`.

    `what` names the tensor in errors.
    """

    start: int
    stop: int
    sink: Callable[[int, Tensor], None]
    what: str


def read_ranges(
    path: Path,
    record: FileRecord,
    block_nbytes: int,
    ranges: Sequence[ByteRange],
    digest: Digest,
    staging: Staging | None = None,
) -> None:
    """Read byte ranges of one file; the blocks that they touch are read once each. Raises CheckpointError for damage."""
    wanted = sorted((r for r in ranges if r.start < r.stop), key=lambda r: r.start)
    if block_nbytes != BLOCK:
        _read_plainly(path, record, block_nbytes, wanted, digest)
        return
    with open_plain(path, is_direct=True) as fd:
        check_size(path, os.fstat(fd).st_size, record)
        staging = staging or make_staging()

        def load(index: int) -> Block:
            block = staging.take()
            nbytes = min(BLOCK, record.nbytes - index * BLOCK)
            _read_all(fd, block.memory, nbytes, index * BLOCK, path)
            if digest(block.memory[:nbytes]) != record.digests[index]:
                raise damaged(path, index, BLOCK, wanted)
            return block

        delivery = _Delivery(wanted)
        for index, block in _ahead(_blocks_of(wanted), load):
            delivery.give(block.tensor, index * BLOCK, min(BLOCK, record.nbytes - index * BLOCK))
            staging.give_back(block)


def make_staging() -> Staging:
    """As many blocks as reading needs."""
    return Staging(2 * NUM_READERS)


def damaged(path: Path, index: int, block_nbytes: int, ranges: Sequence[ByteRange]) -> DamagedError:
    """The error for a block whose digest does not match."""
    low, high = index * block_nbytes, (index + 1) * block_nbytes
    names = list(dict.fromkeys(r.what for r in ranges if r.start < high and low < r.stop))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return DamagedError(
        f"{path} is damaged: bytes [{low}, {high}) do not match their digest; they hold {', '.join(names[:3])}{more}.\n"
        "  Load another checkpoint; `deepspeed.checkpoint verify` lists all that is damaged."
    )


def check_size(path: Path, nbytes: int, record: FileRecord) -> None:
    """Raise CheckpointError unless a file has the size that the manifest gives it."""
    if nbytes != record.nbytes:
        kind = "cut off" if nbytes < record.nbytes else "too long"
        raise CheckpointError(f"{path} is {kind}: it has {nbytes} bytes, the manifest says {record.nbytes}.")


def _blocks_of(ranges: Sequence[ByteRange]) -> Iterator[int]:
    last = -1
    for r in ranges:
        for index in range(max(last + 1, r.start // BLOCK), (r.stop - 1) // BLOCK + 1):
            yield index
            last = index


def _ahead(indices: Iterator[int], load: Callable[[int], Block]) -> Iterator[tuple[int, Block]]:
    """Loaded blocks in order, with NUM_READERS loads running ahead of the one in use."""
    with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="checkpoint-read") as threads:
        running: deque[tuple[int, Future[Block]]] = deque()
        try:
            for index in indices:
                running.append((index, threads.submit(load, index)))
                if len(running) > NUM_READERS:
                    first, future = running.popleft()
                    yield first, future.result()
            while running:
                first, future = running.popleft()
                yield first, future.result()
        finally:
            for _, future in running:
                future.cancel()


class _Delivery:
    """Hands the bytes of a file, block by block in order, to the ranges that want them."""

    def __init__(self, ranges: Sequence[ByteRange]) -> None:
        self._waiting = deque(ranges)
        self._open: list[ByteRange] = []

    def give(self, data: Tensor, start: int, nbytes: int) -> None:
        """Bytes [start, start + nbytes) of the file are at the beginning of `data`."""
        stop = start + nbytes
        while self._waiting and self._waiting[0].start < stop:
            self._open.append(self._waiting.popleft())
        for r in self._open:
            low, high = max(start, r.start), min(stop, r.stop)
            if low < high:
                r.sink(low - r.start, data.narrow(0, low - start, high - low))
        self._open = [r for r in self._open if r.stop > stop]


def _read_all(fd: int, memory: memoryview, nbytes: int, offset: int, path: Path) -> None:
    done, end = 0, -(-nbytes // PAGE) * PAGE
    while done < nbytes:
        count = os.preadv(fd, [memory[done:end]], offset + done)
        if count == 0:
            raise CheckpointError(f"{path} is cut off: it ends at byte {offset + done} while being read.")
        done += count


def _read_plainly(
    path: Path, record: FileRecord, block_nbytes: int, ranges: Sequence[ByteRange], digest: Digest
) -> None:
    """The same for checkpoints whose blocks have another size than this release's."""
    delivery = _Delivery(ranges)
    with open_plain(path) as fd:
        check_size(path, os.fstat(fd).st_size, record)
        for index in range(len(record.digests)):
            low = index * block_nbytes
            nbytes = min(block_nbytes, record.nbytes - low)
            if any(r.start < low + nbytes and low < r.stop for r in ranges):
                data = bytearray(nbytes)
                _read_all(fd, memoryview(data), nbytes, low, path)
                if digest(data) != record.digests[index]:
                    raise damaged(path, index, block_nbytes, ranges)
                delivery.give(torch.frombuffer(data, dtype=torch.uint8), low, nbytes)
