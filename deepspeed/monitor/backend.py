"""A destination of events, and the shell around it that keeps its failures away from training.

`MonitorMaster` makes one `Monitor` per enabled section. A `Backend` may raise whatever its library raises: no disk, no
network, not installed. The shell says so once, goes on trying, because disks are freed and networks come back, and gives
up after `MAX_FAILURES` in a row.

Invariant: nothing that a backend does reaches the training loop as an exception.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from deepspeed.utils.logging import logger

MAX_FAILURES = 10
"""Failures in a row after which a backend is not tried again."""


class Event(NamedTuple):
    """One value of one quantity. `step` is the x axis: global samples for what the engine writes."""

    name: str
    value: Any
    step: int


class FlushEvery:
    """Says when to flush: at the first write, and then at most once in `seconds`, so that fast steps are not slowed."""

    def __init__(self, seconds: float = 1.0) -> None:
        self._seconds = seconds
        self._next_s = 0.0

    def is_due(self) -> bool:
        """Whether to flush now."""
        now_s = time.monotonic()
        if now_s < self._next_s:
            return False
        self._next_s = now_s + self._seconds
        return True


class Backend(Protocol):
    """Where events go."""

    def write(self, events: Sequence[Event]) -> None:
        """Take some events; may raise."""

    def close(self) -> None:
        """Write what is still buffered; may raise."""


class Monitor:
    """A backend that cannot fail. `enabled` is the section's wish, on the rank that writes."""

    def __init__(self, make: Callable[[], Backend], *, enabled: bool, name: str) -> None:
        self.enabled = enabled
        self.name = name
        self.num_failures = 0
        self.backend: Backend | None = None
        if enabled:
            self.attempt("could not start", lambda: setattr(self, "backend", make()))

    def write_events(self, event_list: Sequence[tuple[str, Any, int]], flush: bool = True) -> None:
        """Write (name, value, step) tuples. `flush` is accepted and has no effect: every backend flushes on its own."""
        if self.backend is not None:
            self.write(as_events(event_list))

    def write(self, events: Sequence[Event]) -> None:
        """Write events whose values are numbers."""
        backend = self.backend
        if backend is not None and events:
            self.attempt("could not write", lambda: backend.write(events))

    def close(self) -> None:
        """End the backend; later events are dropped."""
        backend, self.backend = self.backend, None
        if backend is not None:
            self.attempt("could not finish", backend.close)

    def attempt(self, what: str, call: Callable[[], Any]) -> None:
        """Call into the backend's library; what it raises is told, and counted."""
        try:
            call()
        except Exception as error:  # whatever a library raises, training goes on
            self.num_failures += 1
            if self.num_failures == 1:
                logger.warning("%s %s, training goes on: %s: %s", self.name, what, type(error).__name__, error)
            elif self.num_failures == MAX_FAILURES:
                logger.warning("%s failed %d times in a row; it is not tried again.", self.name, MAX_FAILURES)
                self.backend = None
        else:
            self.num_failures = 0


def as_events(event_list: Sequence[tuple[str, Any, int]]) -> list[Event]:
    """What a script gave, scalar tensors and arrays as numbers. What is none is left out with a warning: only the rank
    that writes would stop for it, and leave the others waiting."""
    events = []
    for entry in event_list:
        try:
            name, value, step = entry
            events.append(Event(name, value.item() if callable(getattr(value, "item", None)) else value, int(step)))
        except (TypeError, ValueError, RuntimeError) as error:
            logger.warning(
                "write_events: %.200r is left out: %s.\n  Give (name, number, step), and of a tensor its mean or one element.",
                entry,
                error,
            )
    return events
