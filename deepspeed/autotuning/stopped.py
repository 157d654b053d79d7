"""Signals that ask a search to end: Ctrl-C, and those of a terminal that is closed or of a job's scheduler.

Each raises KeyboardInterrupt where the program stands, so that the trial that runs is ended with all that it started. That may be
inside of something that drops it: the import of a C extension may clear any error. So the search asks again before each trial.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

SIGNALS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}
"""And the handlers that are replaced; any other, such as one that ignores the signal, stays."""


class Stopped:
    """While entered, a signal that asks to end raises KeyboardInterrupt, and is remembered."""

    def __init__(self) -> None:
        self._came: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopped:
        if threading.current_thread() is threading.main_thread():
            ours = [number for number, plain in SIGNALS.items() if signal.getsignal(number) == plain]
            self._before = {number: signal.signal(number, self._raise) for number in ours}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self._came = number
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal came."""
        if self._came is not None:
            raise KeyboardInterrupt

    @property
    def name(self) -> str:
        """Of the signal that came."""
        return signal.Signals(self._came or signal.SIGINT).name

    @property
    def exit_code(self) -> int:
        """Of a program that the signal ended, as shells have it."""
        return 128 + (self._came or signal.SIGINT)


@contextlib.contextmanager
def passed_on(receive: Callable[[int], object]) -> Iterator[None]:
    """While entered, `receive` is called with the signals that ask to end; those that are ignored stay so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, frame: receive(number)) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """While entered, signals that ask to end wait for its end: for what has to be done to the last."""
    came: list[int] = []
    with passed_on(came.append):
        yield
    for number in came[:1]:
        signal.raise_signal(number)
