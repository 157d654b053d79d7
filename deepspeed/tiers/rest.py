"""Flat bytes at rest on a tier: one 1-D tensor's worth, loaded and stored in pieces.

Made by `zero.placing` for parameters' shards, masters, optimizer states and gradients; used by buckets, the reducer and
the streaming step, which never ask where bytes rest but whether they can be seen (`view`) or have to be moved.

    InMemory    a tensor; `view` is a slice of it, loads and stores are copies
    OnDisk      a file of the nvme store; loads and stores are reads and writes

Invariant: a store is complete, and a load's target filled, when the transfer's `wait` returns; until then the tensor
handed over is borrowed. What cannot even start (a folder that is gone) fails in `wait` too: a rank that raised earlier would
leave the others waiting in the collective that follows.
"""

from __future__ import annotations

from typing import Protocol, final

import torch
from torch import Tensor

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

    def view(self, start: int, stop: int) -> Tensor | None:
        """The elements themselves, where they are in memory; None where they have to be loaded."""

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
class InMemory:
    """A tensor in the memory of the device or of the host."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.numel = tensor.numel()
        self.dtype = tensor.dtype

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


def _copied(source: Tensor, target: Tensor) -> Transfer:
    device = next((t.device for t in (source, target) if t.device.type != "cpu"), None)
    if device is None:
        return Copied()
    event = torch.Event(device)
    event.record()
    return Copied(event)


@final
class OnDisk:
    """A key of the nvme store, of its own; `kind` says in errors what the bytes are."""

    def __init__(self, store: NvmeStore, kind: str, numel: int, dtype: torch.dtype) -> None:
        self.store = store
        self.key = store.new_key(kind)
        self.numel = numel
        self.dtype = dtype
        store.reserve(self.key, numel * dtype.itemsize)

    def view(self, start: int, stop: int) -> Tensor | None:
        """See Rest."""
        return None

    def start_load(self, start: int, into: Tensor) -> Transfer:
        """See Rest."""
        is_here = into.device.type == "cpu"
        target = into if is_here else torch.empty(into.numel(), dtype=self.dtype, pin_memory=True)
        try:
            read = self.store.start_get(self.key, target, start * self.dtype.itemsize)
        except TierError as error:
            return Refused(error)
        return read if is_here else _Staged(read, target, into)

    def start_store(self, start: int, source: Tensor) -> Transfer:
        """See Rest. From a device the bytes are brought to main memory first, which the host waits for."""
        try:
            return self.store.start_put(self.key, source.cpu(), start * self.dtype.itemsize)
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
