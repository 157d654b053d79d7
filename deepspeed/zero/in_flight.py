"""Reductions on the wire: so many at once, ended in the order in which they were started.

Owned by the reducer, which says what is started when. A flat buffer that a bucket keeps may not be written before the
reduction that reads it has ended; one that is borrowed goes with its reduction.

Invariant: every rank starts the same reductions in the same order, and ends them in that order too.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, final

import torch

from deepspeed.comm.exchange import Pending
from deepspeed.zero.gradients import Gradients


class InFlight(NamedTuple):
    """A reduction on the wire; `gradients` keeps its buffer until `pending` has been waited for."""

    gradients: Gradients
    pending: Pending


@final
class ReductionsInFlight:
    """At most `most` reductions; the next one waits for the oldest."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._queue: deque[InFlight] = deque()

    def has(self, gradients: Gradients) -> bool:
        """Whether a reduction of these is on the wire."""
        return any(other.gradients is gradients for other in self._queue)

    def start(self, gradients: Gradients) -> None:
        """Start to reduce what was laid down."""
        while self._queue and (self._queue[0].pending.is_done or len(self._queue) >= self.most):
            self._end_oldest()
        with torch.profiler.record_function("zero.reduce"):
            self._queue.append(InFlight(gradients, gradients.start_reduce()))

    def end(self, gradients: Gradients) -> None:
        """Have a flat buffer that stays off the wire before it is written again."""
        while gradients.is_whole and self.has(gradients):
            self._end_oldest()

    def end_all(self) -> None:
        """Have nothing on the wire."""
        while self._queue:
            self._end_oldest()

    def _end_oldest(self) -> None:
        gradients, pending = self._queue.popleft()
        pending.wait()
        gradients.finish_reduce()
