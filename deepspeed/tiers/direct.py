"""Bytes between the store's files and a device's memory without a stop in main memory (GPUDirect Storage, `aio.use_gds`).

Opened by the store beside its queue, where the accelerator has it (`direct_file`: torch.cuda.gds.GdsFile of torch 2.7
and later); else one line says why not, and bytes pass through pinned memory as ever. The library moves whole storages and
knows nothing of streams, so a transfer

    is carried out by a thread, after an event that the current stream reached when it was started
    goes through memory of its own on the device where its tensor is a part of a larger storage

No processor sees the bytes, so they have no checksums: what was written in this way is UNCHECKED, and what is read in it is not
compared. On a device it has never run: the tests put a fake in the library's place.

Invariant: as of every transfer of the store: the tensor is borrowed until `wait`, and conflicting transfers are in order.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from deepspeed.accelerator import get_accelerator
from deepspeed.tiers.block_file import BlockFile
from deepspeed.tiers.pieces import stripes
from deepspeed.tiers.request import Failure
from deepspeed.utils.logging import warn_once


@final
class DirectTicket:
    """A piece under way; see Ticket."""

    def __init__(self, file: BlockFile, offset: int, nbytes: int, future: Future[None]) -> None:
        self._file, self._offset, self._nbytes, self._future = file, offset, nbytes, future

    @property
    def is_done(self) -> bool:
        """Whether the outcome is there."""
        return self._future.done()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the outcome; False when it is not there after that time."""
        try:
            self._future.exception(timeout_s)
        except NotYet:
            return False
        return True

    @property
    def failure(self) -> Failure | None:
        """What went wrong, once done. The library tells no number of the system's."""
        error = self._future.exception()
        if error is None:
            return None
        number = error.errno if isinstance(error, OSError) else None
        return Failure("os", number or errno.EIO, self._file, self._offset, self._nbytes, 0)


class DirectPiece(NamedTuple):
    """A ticket, and memory on the device whose bytes go to or come from the file."""

    ticket: DirectTicket
    memory: Tensor
    """uint8; the piece of the tensor itself, where that is a storage of its own."""


@final
class DirectFiles:
    """The files of one store, opened for the device's library."""

    def __init__(self, files: Sequence[BlockFile], opened: Sequence[Any], stripe_nbytes: int, num_threads: int) -> None:
        self._files, self._opened, self._stripe_nbytes = files, list(opened), stripe_nbytes
        accelerator = get_accelerator()
        self.device_type = accelerator.platform.device_type
        """Of tensors that it moves."""
        begin_thread = functools.partial(accelerator.set_device, int(accelerator.current_device()))
        self._pool = ThreadPoolExecutor(num_threads, "deepspeed-gds", begin_thread)

    def start(self, offset: int, flat: Tensor, *, is_write: bool) -> list[tuple[int, DirectPiece]]:
        """Begin to move `flat`, uint8 on the device, from the byte `offset` of the files' space on: (its first byte, piece)."""
        started = []
        for piece in stripes(offset, flat.numel(), len(self._files), self._stripe_nbytes):
            part = flat.narrow(0, piece.start, piece.nbytes)
            memory = part if _is_whole(part) else torch.empty_like(part)
            if is_write and memory is not part:
                memory.copy_(part)
            event = get_accelerator().Event()
            event.record()  # the memory may still be written, or read, by what was queued before
            future = self._pool.submit(self._move, piece.file_index, piece.file_offset, memory, event, is_write)
            ticket = DirectTicket(self._files[piece.file_index], piece.file_offset, piece.nbytes, future)
            started.append((piece.start, DirectPiece(ticket, memory)))
        return started

    def _move(self, index: int, offset: int, memory: Tensor, event: Any, is_write: bool) -> None:
        event.synchronize()
        file, storage = self._opened[index], memory.untyped_storage()
        _ = file.save_storage(storage, offset) if is_write else file.load_storage(storage, offset)

    def close(self) -> None:
        """Wait for what is under way and close the files. Again is nothing."""
        self._pool.shutdown(wait=True)
        self._opened.clear()


def _is_whole(part: Tensor) -> bool:
    return part.storage_offset() == 0 and part.untyped_storage().nbytes() == part.numel()


def try_direct(files: Sequence[BlockFile], stripe_nbytes: int, num_threads: int) -> DirectFiles | str:
    """The files, opened for the device's library; a text that says why not, where they cannot be."""
    accelerator = get_accelerator()
    try:
        opened = [accelerator.direct_file(str(file.path), os.O_RDWR) for file in files]
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    if not opened or None in opened:
        return f"torch {torch.__version__} has no GPUDirect Storage for {accelerator.name} devices"
    return DirectFiles(files, opened, stripe_nbytes, num_threads)


def open_direct(files: Sequence[BlockFile], stripe_nbytes: int, num_threads: int) -> DirectFiles | None:
    """The store's files for the device's library; None, told once with the reason, where they cannot be opened."""
    found = try_direct(files, stripe_nbytes, num_threads)
    if isinstance(found, str):
        warn_once(f"aio.use_gds = true has no effect, bytes pass through pinned memory: {found}.")
        return None
    return found
