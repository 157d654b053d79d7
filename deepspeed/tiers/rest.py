"""Flat bytes at rest on a tier: one 1-D tensor's worth, loaded and stored in pieces.

Made by `zero.placing` for parameters' shards, masters, optimizer states and gradients; used by buckets, the reducer and
the streaming step, which never ask where bytes rest but whether they can be seen (`view`) or have to be moved.

    InMemory    a tensor; `view` is a slice of it, loads and stores are copies
    OnHost      main memory beside a device: the same, by copies on a stream of their own
    OnDisk      a file of the nvme store; loads and stores are reads and writes

Note [Copies beside a device]
    A copy is queued on the `CopyStream`, after what the current stream was asked for. Its `wait` orders the current stream after
    it and does not hold the host up: what is loaded is used on the device, and what was stored from may be written again there.
    The host waits when it wants to see the bytes itself, in `view`. Only pinned memory is copied in this way; for pageable
    memory the driver makes the host wait.

Invariant: a store is complete, and a load's target filled, when the transfer's `wait` returns; until then the tensor
handed over is borrowed. What cannot even start (a folder that is gone) fails in `wait` too: a rank that raised earlier would
leave the others waiting in the collective that follows.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol, final

import torch
from torch import Tensor

from deepspeed.accelerator import get_accelerator
from deepspeed.tiers.nvme import NvmeStore
from deepspeed.utils.errors import TierError


class Transfer(Protocol):
    """Bytes on their way."""

    @property
    def is_done(self) -> bool:
        """Whether `wait` would not wait."""

    def wait(self) -> None:
        """Finish. Raises TierError where the bytes could not be moved."""


class Rest(Protocol):
    """A flat tensor [numel] of one dtype at rest."""

    numel: int
    dtype: torch.dtype

    @property
    def tensor(self) -> Tensor | None:
        """All elements, where they are in memory and no copy of them is ever under way; None elsewhere."""

    @property
    def device(self) -> torch.device | None:
        """Where `view` sees the elements; None where it sees none."""

    def view(self, start: int, stop: int) -> Tensor | None:
        """The elements themselves, where they are in memory, with every copy done; None where they have to be loaded."""

    def start_load(self, start: int, into: Tensor) -> Transfer:
        """Start filling `into` with the elements from `start` on."""

    def start_store(self, start: int, source: Tensor) -> Transfer:
        """Start replacing the elements from `start` on by `source`, which has the same dtype."""

    def release(self) -> None:
        """Give up the memory or the file."""


@final
class Copied:
    """A copy that was queued on the device's stream, or is done."""

    def __init__(self, event: torch.Event | None = None) -> None:
        self._event = event

    @property
    def is_done(self) -> bool:
        """See Transfer."""
        return self._event is None or self._event.query()

    def wait(self) -> None:
        """See Transfer. Blocks the host: what was copied to main memory is about to be read there."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None


@final
class Refused:
    """A transfer that could not start."""

    is_done = True

    def __init__(self, error: TierError) -> None:
        self._error = error

    def wait(self) -> None:
        """See Transfer."""
        raise self._error


@final
class CopyStream:
    """A device's stream for copies to and from main memory, so that they run beside computation. One per engine."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: Any = None

    def copy(self, target: Tensor, source: Tensor) -> Any:
        """Queue a copy after what the current stream was asked for; the event after which it is done."""
        accelerator = get_accelerator()
        if not accelerator.has_streams():  # Metal: done when the call returns
            target.copy_(source)
            return accelerator.Event()
        if self._stream is None:
            self._stream = accelerator.Stream(device=self.device)
        self._stream.wait_stream(accelerator.current_stream(self.device.index))
        with accelerator.stream(self._stream):
            target.copy_(source, non_blocking=True)  # of memory that is not pinned, the host waits in here
            event = accelerator.Event()
            event.record(self._stream)
        for tensor in (target, source):
            if tensor.device.type != "cpu":  # its memory may be given up before the copy is done
                tensor.record_stream(self._stream)
        return event


@final
class Ordered:
    """A copy on a stream of its own. Waiting is the current stream's, not the host's: see Note [Copies beside a device]."""

    is_done = True

    def __init__(self, event: Any) -> None:
        self._event = event

    def wait(self) -> None:
        """See Transfer."""
        self._event.wait(get_accelerator().current_stream())


@final
class InMemory:
    """A tensor in the memory of the device or of the host."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.numel = tensor.numel()
        self.dtype = tensor.dtype

    @property
    def device(self) -> torch.device | None:
        """See Rest."""
        return self.tensor.device

    def view(self, start: int, stop: int) -> Tensor | None:
        """See Rest."""
        return self.tensor[start:stop]

    def start_load(self, start: int, into: Tensor) -> Transfer:
        """See Rest. Onto a device the copy is ordered before later work of its stream, so nothing is waited for."""
        into.copy_(self.tensor[start : start + into.numel()], non_blocking=True)
        return _copied(source=self.tensor, target=into)

    def start_store(self, start: int, source: Tensor) -> Transfer:
        """See Rest."""
        self.tensor[start : start + source.numel()].copy_(source, non_blocking=True)
        return _copied(source=source, target=self.tensor)

    def release(self) -> None:
        """See Rest."""
        self.tensor = self.tensor.new_empty(0)


@final
class OnHost:
    """Main memory beside a device; see Note [Copies beside a device]."""

    tensor: Tensor | None = None

    def __init__(self, tensor: Tensor, copies: CopyStream) -> None:
        self.numel = tensor.numel()
        self.dtype = tensor.dtype
        self._tensor = tensor
        self._copies = copies
        self._last: Any = None
        """The last copy from or to the tensor; earlier ones are done when it is."""

    @property
    def device(self) -> torch.device | None:
        """See Rest."""
        return self._tensor.device

    def view(self, start: int, stop: int) -> Tensor | None:
        """See Rest. The host waits for copies under way: it is about to read what they write, or to write what they read."""
        last, self._last = self._last, None
        if last is not None and not last.query():
            last.synchronize()
        return self._tensor[start:stop]

    def start_load(self, start: int, into: Tensor) -> Transfer:
        """See Rest."""
        return self._start(into, start, is_store=False)

    def start_store(self, start: int, source: Tensor) -> Transfer:
        """See Rest."""
        return self._start(source, start, is_store=True)

    def _start(self, other: Tensor, start: int, *, is_store: bool) -> Transfer:
        if other.device.type == "cpu":
            here = self.view(start, start + other.numel())
            assert here is not None, "main memory can be seen"
            _ = here.copy_(other) if is_store else other.copy_(here)
            return Copied()
        here = self._tensor[start : start + other.numel()]
        self._last = self._copies.copy(here, other) if is_store else self._copies.copy(other, here)
        return Ordered(self._last)

    def release(self) -> None:
        """See Rest."""
        self.view(0, 0)
        self._tensor = self._tensor.new_empty(0)


def _copied(source: Tensor, target: Tensor) -> Transfer:
    """Within one memory the current stream orders later work after the copy; between two the host waits for it."""
    if source.device == target.device:
        return Copied()
    event = torch.Event(next(t.device for t in (source, target) if t.device.type != "cpu"))
    event.record()
    return Copied(event)


@final
class OnDisk:
    """A key of the nvme store, of its own; `kind` says in errors what the bytes are."""

    tensor: Tensor | None = None

    def __init__(self, store: NvmeStore, kind: str, numel: int, dtype: torch.dtype) -> None:
        self.store = store
        self.key = store.new_key(kind)
        self.numel = numel
        self.dtype = dtype
        self._copies: CopyStream | None = None
        self._staged: deque[_StagedStore] = deque()
        """Stores from a device that wait for their bytes."""
        store.reserve(self.key, numel * dtype.itemsize)

    @property
    def device(self) -> torch.device | None:
        """See Rest."""
        return None

    def view(self, start: int, stop: int) -> Tensor | None:
        """See Rest."""
        return None

    def start_load(self, start: int, into: Tensor) -> Transfer:
        """See Rest."""
        is_here = self.store.moves(into.device)
        target = into if is_here else torch.empty(into.numel(), dtype=self.dtype, pin_memory=True)
        try:
            read = self.store.start_get(self.key, target, start * self.dtype.itemsize)
        except TierError as error:
            return Refused(error)
        return read if is_here else _Staged(read, target, into)

    def start_store(self, start: int, source: Tensor) -> Transfer:
        """See Rest. From a device the bytes come to pinned memory first, and are written once they are there; unless the store
        takes them itself."""
        if self.store.moves(source.device):
            return self._start_put(start, source)
        while self._staged and self._staged[0].is_staged:
            self._staged.popleft().start()
        if self._copies is None:
            self._copies = CopyStream(source.device)
        staged = torch.empty(source.numel(), dtype=self.dtype, pin_memory=True)
        store = _StagedStore(self, start, staged, self._copies.copy(staged, source))
        self._staged.append(store)
        return store

    def _start_put(self, start: int, source: Tensor) -> Transfer:
        try:
            return self.store.start_put(self.key, source, start * self.dtype.itemsize)
        except TierError as error:
            return Refused(error)

    def release(self) -> None:
        """See Rest."""
        self.store.remove(self.key)


class _Staged:
    """A read into pinned memory, then a copy to the device."""

    def __init__(self, read: Transfer, staged: Tensor, into: Tensor) -> None:
        self._read, self._staged, self._into = read, staged, into

    @property
    def is_done(self) -> bool:
        """See Transfer."""
        return self._read.is_done

    def wait(self) -> None:
        """See Transfer."""
        self._read.wait()
        self._into.copy_(self._staged, non_blocking=True)


class _StagedStore:
    """A copy from the device to pinned memory, then a write."""

    def __init__(self, rest: OnDisk, start: int, staged: Tensor, event: Any) -> None:
        self._rest, self._start, self._staged, self._event = rest, start, staged, event
        self._write: Transfer | None = None

    @property
    def is_staged(self) -> bool:
        """Whether the bytes are in main memory."""
        return self._write is not None or bool(self._event.query())

    @property
    def is_done(self) -> bool:
        """See Transfer."""
        return self.is_staged and self.start().is_done

    def start(self) -> Transfer:
        """Start to write, once; the host waits for the bytes if they are not here."""
        if self._write is None:
            if not self._event.query():
                self._event.synchronize()
            self._write = self._rest._start_put(self._start, self._staged)
        return self._write

    def wait(self) -> None:
        """See Transfer."""
        self.start().wait()
