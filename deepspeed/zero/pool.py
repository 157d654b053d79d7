"""Flat buffers lent to reductions and taken back.

Made by the engine, one per reducer; borrowed from by `zero.gradients` where gradients rest sharded, so that a bucket has a
flat buffer only from its last gradient until its reduction ended. A few of each size are kept, so that memory is not
mapped anew, together with the views that buckets have of them.

Invariant: a buffer is given back when nothing reads it any more, and by whom it was lent to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from deepspeed.zero.bucket import Bucket

MAX_IN_FLIGHT = 4
"""Reductions on the wire at once; the next launch waits for the oldest, which bounds the borrowed memory.

Not where parameters are sharded: there another rank may need a gather from us before it comes to launch its side of
the reduction, and waiting for it would be waiting for each other. Those that are done are taken in all the same.
"""

MAX_STORING = 2
"""Borrowed buffers that may wait for their gradients to reach a tier; the next one waits for the oldest."""


class FlatBuffer:
    """A flat buffer and the views that buckets of its size have of it, made once each."""

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat
        self._views: dict[int, list[Tensor]] = {}

    def views_of(self, bucket: Bucket) -> list[Tensor]:
        """The parameters' views, in their shapes."""
        if id(bucket) not in self._views:
            self._views[id(bucket)] = bucket.split(self.flat)
        return self._views[id(bucket)]


class FlatPool:
    """Lends flat buffers; keeps up to `max_kept` of each size that came back."""

    def __init__(self, max_kept: int = MAX_IN_FLIGHT) -> None:
        self._free: dict[tuple[int, torch.dtype], list[FlatBuffer]] = {}
        self._max_kept = max_kept
        self._storing: deque[Callable[[], None]] = deque()

    def note_storing(self, finish: Callable[[], None]) -> None:
        """A buffer's bytes are on their way to a tier, and `finish` waits for them: at most MAX_STORING may be, or backward
        outruns the disk."""
        self._storing.append(finish)
        while len(self._storing) > MAX_STORING:
            self._storing.popleft()()

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> FlatBuffer:
        """A 1-D buffer, uninitialised."""
        free = self._free.get((numel, dtype))
        return free.pop() if free else FlatBuffer(torch.empty(numel, dtype=dtype, device=device))

    def give_back(self, buffer: FlatBuffer) -> None:
        """Return a buffer that nothing reads any more; it is freed if as many wait as are normally on the wire."""
        free = self._free.setdefault((buffer.flat.numel(), buffer.flat.dtype), [])
        if len(free) < self._max_kept:
            free.append(buffer)

    def clear(self) -> None:
        """Free what is not lent."""
        self._free.clear()

    @property
    def nbytes(self) -> int:
        """Bytes kept for reuse."""
        return sum(buffer.flat.nbytes for buffers in self._free.values() for buffer in buffers)
