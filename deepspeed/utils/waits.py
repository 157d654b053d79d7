"""Where a step waits: one counter for communication, one for offload, added to by whoever waits.

`comm` and `mesh` add to COMMUNICATION, tiers add to OFFLOAD (and keep RESTING up to date); the engine's step monitor reads
the differences between two steps. Counters only grow, like those of an operating system, so that any number of readers
may look. They are the process's: two engines in one process see each other's waits.

On an accelerator the host does not wait, the compute stream does. There a wait is a pair of device events around it, and
is taken only while `times_device` is set, because events cost and somebody has to read them.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Any

MAX_OPEN = 1024
"""Event pairs kept before the oldest is resolved, which by then has long passed."""


class Waits:
    """Seconds waited, bytes moved, by operation."""

    def __init__(self) -> None:
        self.times_device = False
        """Whether device events are to be recorded, because somebody reads them."""
        self.nbytes: defaultdict[str, int] = defaultdict(int)
        """Message bytes by operation."""
        self.host_s = 0.0
        """Seconds that the host waited. Who waits at every message adds to these two in place, others by `add` or `during`."""
        self._device_s = 0.0
        self._open: deque[tuple[Any, Any]] = deque()

    def add(self, seconds: float, op: str = "", nbytes: int = 0) -> None:
        """This process waited `seconds` for `op`, which moved `nbytes`."""
        self.host_s += seconds
        if nbytes:
            self.nbytes[op] += nbytes

    def add_events(self, begin: Any, end: Any) -> None:
        """The device's stream stood still between two timed events."""
        self._open.append((begin, end))
        if len(self._open) > MAX_OPEN:
            self._resolve(1)

    @contextlib.contextmanager
    def during(self, op: str = "", nbytes: int = 0) -> Iterator[None]:
        """Count the time inside, on the host."""
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self.add(time.perf_counter() - start_s, op, nbytes)

    @property
    def seconds(self) -> float:
        """All that was waited so far; waits for the device to pass the events that are open."""
        self._resolve(len(self._open))
        return self.host_s + self._device_s

    def _resolve(self, count: int) -> None:
        for _ in range(count):
            begin, end = self._open.popleft()
            end.synchronize()
            self._device_s += begin.elapsed_time(end) / 1e3


COMMUNICATION = Waits()
"""Waits for other ranks and for the wire."""
OFFLOAD = Waits()
"""Waits for bytes to come from or go to another tier."""
OFFLOAD_S: dict[str, float] = {"disk": 0.0, "compute": 0.0}
"""Seconds in which a disk worked for us, waited for or not, and in which the step of offloaded shards was computed."""
RESTING: dict[str, int] = {}
"""Bytes at rest by tier, where the operating system cannot tell: `RESTING["nvme"]`. Written by the tiers."""
