"""Ctrl-C for a search, also where KeyboardInterrupt was raised inside of something that drops it: the import of a C extension
may clear any error. The search asks again before each trial.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Stopped:
    """While entered, SIGINT raises KeyboardInterrupt where the program stands, and is remembered. A handler that is not Python's own,
    such as one that ignores the signal, stays."""

    def __init__(self) -> None:
        self._came = False
        self._before: Any = None

    def __enter__(self) -> Stopped:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._before = signal.signal(signal.SIGINT, self._raise)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self._came = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt if the signal came."""
        if self._came:
            raise KeyboardInterrupt
