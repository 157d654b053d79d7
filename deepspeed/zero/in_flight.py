"""Reductions on the wire: so many at once, ended in the order in which they were started.

Owned by the reducer, which says what is started when. A flat buffer that a bucket keeps may not be written before the
reduction that reads it has ended; one that is borrowed goes with its reduction.

Invariant: every rank starts the same reductions in the same order, and ends them in that order too.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, final

from deepspeed.comm.exchange import Pending
from deepspeed.zero.gradients import Gradients


class Limit(NamedTuple):
    """How much may be on the wire at once; one reduction always may."""

    reductions: int
    nbytes: int
    """Of their flat buffers."""


UNLIMITED = Limit(2**31, 2**62)


class InFlight(NamedTuple):
    """A reduction on the wire; `gradients` keeps its buffer until `pending` has been waited for."""

    gradients: Gradients
    pending: Pending
    nbytes: int
    """Of the flat buffer."""


@final
class ReductionsInFlight:
    """At most `limit`; the next one waits for the oldest."""

    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self.queue: deque[InFlight] = deque()
        """In the order in which they were started."""

    def has(self, gradients: Gradients) -> bool:
        """Whether a reduction of these is on the wire."""
        return any(other.gradients is gradients for other in self.queue)

    def make_room(self, gradients: Gradients) -> None:
        """A reduction of these is about to start while others are on the wire: end those that are done, and the oldest ones if
        it would not fit."""
        nbytes = gradients.bucket.layout.padded_numel * gradients.dtype.itemsize
        while self.queue and (self.queue[0].pending.is_done or not self._has_room(nbytes)):
            self._end_oldest()

    def add(self, gradients: Gradients, pending: Pending) -> None:
        """It has started."""
        nbytes = gradients.bucket.layout.padded_numel * gradients.dtype.itemsize
        self.queue.append(InFlight(gradients, pending, nbytes))

    @property
    def nbytes(self) -> int:
        """Of the flat buffers of what is on the wire."""
        return sum(other.nbytes for other in self.queue)

    def _has_room(self, nbytes: int) -> bool:
        return len(self.queue) < self.limit.reductions and self.nbytes + nbytes <= self.limit.nbytes

    def end(self, gradients: Gradients) -> None:
        """Have a flat buffer that stays (`is_whole`) off the wire before it is written again."""
        while self.has(gradients):
            self._end_oldest()

    def end_all(self) -> None:
        """Have nothing on the wire."""
        while self.queue:
            self._end_oldest()

    def _end_oldest(self) -> None:
        gradients, pending, _ = self.queue.popleft()
        pending.wait()
        gradients.finish_reduce()
