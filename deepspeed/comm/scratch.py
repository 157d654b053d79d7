"""Scratch memory that verbs in flight receive into, kept for the next: touching fresh pages costs more than copying.

Each `DirectExchange` has one. Messages have as many sizes as a model has buckets, so what is kept is found by size, not
by equality: a block goes to a message that fills at least half of it. `Shelf` is that rule without memory: also for flat
buffers (`zero.pool`), and for whoever predicts what is kept (`memory/replay.py`).

Invariant: beyond what is lent, a shelf keeps no more bytes than `max_kept` of the largest blocks it ever lent.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import Generic, TypeVar, final

import torch
from torch import Tensor

NUM_KEPT = 2
"""What an exchange keeps, in blocks of the largest size."""

T = TypeVar("T")


@final
class Shelf(Generic[T]):
    """Blocks by size: the smallest that fits is taken, the smallest of all are given up when too much is kept."""

    def __init__(self, max_kept: int) -> None:
        self._max_kept = max_kept
        self._sizes: list[int] = []
        self._blocks: list[T] = []
        self._largest = 0
        self.nbytes = 0
        """Bytes that lie here now."""

    def take(self, nbytes: int) -> tuple[int, T] | None:
        """Size and block for a message of `nbytes`; None: it needs a new one."""
        self._largest = max(self._largest, nbytes)
        at = bisect_left(self._sizes, nbytes)
        if at == len(self._sizes) or self._sizes[at] > 2 * nbytes:
            return None
        self.nbytes -= self._sizes[at]
        return self._sizes.pop(at), self._blocks.pop(at)

    def give_back(self, nbytes: int, block: T) -> list[int]:
        """Lay a block of `nbytes` down; the sizes of those that were given up for it."""
        at = bisect_left(self._sizes, nbytes)
        self._sizes.insert(at, nbytes)
        self._blocks.insert(at, block)
        self.nbytes += nbytes
        given_up = []
        while self.nbytes > self._max_kept * self._largest:
            del self._blocks[0]
            given_up.append(self._sizes.pop(0))
            self.nbytes -= given_up[-1]
        return given_up

    def clear(self) -> None:
        """Give up all that lies here."""
        self._sizes.clear()
        self._blocks.clear()
        self.nbytes = 0


@final
class Scratch:
    """Tensors in main memory, lent and taken back."""

    def __init__(self) -> None:
        self._shelf: Shelf[torch.UntypedStorage] = Shelf(NUM_KEPT)

    @property
    def nbytes(self) -> int:
        """Bytes kept for reuse."""
        return self._shelf.nbytes

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A 1-D tensor, uninitialised."""
        nbytes = numel * dtype.itemsize
        found = self._shelf.take(nbytes)
        storage = found[1] if found is not None else torch.UntypedStorage(nbytes, device="cpu")
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, (numel,), (1,))

    def give_back(self, lent: Iterable[Tensor]) -> bool:
        """Return tensors that `take` gave and that nothing reads any more; whether memory was given up for them."""
        storages = [tensor.untyped_storage() for tensor in lent]
        given_up = [self._shelf.give_back(storage.nbytes(), storage) for storage in storages]
        return any(given_up)

    def clear(self) -> None:
        """Free what is not lent."""
        self._shelf.clear()
