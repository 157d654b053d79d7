"""Flat buffers lent to reductions and taken back.

Made by the engine, one per reducer; borrowed from by `zero.sliced_gradients` where gradients rest sharded, so that a bucket has a
flat buffer only from its last gradient until its reduction ended. A few are kept (`comm.scratch.Shelf`), so that memory is
not mapped anew, together with the views that buckets have of them.

Invariant: a buffer is given back when nothing reads it any more, and by whom it was lent to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from deepspeed.comm.scratch import Shelf
from deepspeed.zero.bucket import Bucket

MAX_KEPT = 1
"""What is kept of buffers that came back, in buffers of the largest size: malloc recycles the others as well, and not only for
us. With 1, 2 and 4 a step of two ranks takes the same CPU time (GPT of 24M, fp32, stages 1 to 3)."""

MAX_STORING = 2
"""Borrowed buffers that may wait for their gradients to reach a tier; the next one waits for the oldest."""


class FlatBuffer:
    """A flat buffer, and the views that buckets have of it, made once each."""

    def __init__(self, whole: Tensor) -> None:
        self.whole = self.flat = whole
        """All of its memory, and as much of it as the bucket needs to which it is lent."""
        self._views: dict[int, list[Tensor]] = {}

    def views_of(self, bucket: Bucket) -> list[Tensor]:
        """The parameters' views, in their shapes."""
        if id(bucket) not in self._views:
            self._views[id(bucket)] = bucket.split(self.flat)
        return self._views[id(bucket)]


class FlatPool:
    """Lends flat buffers; keeps as many bytes as `max_kept` of the largest have."""

    def __init__(self, max_kept: int = MAX_KEPT) -> None:
        self._max_kept = max_kept
        self._shelves: dict[tuple[torch.dtype, torch.device], Shelf[FlatBuffer]] = {}
        self._storing: deque[Callable[[], None]] = deque()

    def note_storing(self, finish: Callable[[], None]) -> None:
        """A buffer's bytes are on their way to a tier, and `finish` waits for them: at most MAX_STORING may be, or backward
        outruns the disk."""
        self._storing.append(finish)
        while len(self._storing) > MAX_STORING:
            self._storing.popleft()()

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> FlatBuffer:
        """A 1-D buffer, uninitialised."""
        found = self._shelf(dtype, device).take(numel * dtype.itemsize)
        if found is None:
            return FlatBuffer(torch.empty(numel, dtype=dtype, device=device))
        buffer = found[1]
        buffer.flat = buffer.whole[:numel]
        return buffer

    def give_back(self, buffer: FlatBuffer) -> None:
        """Return a buffer that nothing reads any more; small ones are freed where too much is kept."""
        whole = buffer.whole
        self._shelf(whole.dtype, whole.device).give_back(whole.nbytes, buffer)

    def _shelf(self, dtype: torch.dtype, device: torch.device) -> Shelf[FlatBuffer]:
        kind = (dtype, device)
        if kind not in self._shelves:
            self._shelves[kind] = Shelf(self._max_kept)
        return self._shelves[kind]

    def clear(self) -> None:
        """Free what is not lent."""
        for shelf in self._shelves.values():
            shelf.clear()

    @property
    def nbytes(self) -> int:
        """Bytes kept for reuse."""
        return sum(shelf.nbytes for shelf in self._shelves.values())
