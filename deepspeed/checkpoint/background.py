"""Asynchronous saves: one at a time, in a thread that waits for the disk and publishes while training goes on.

Owned by the engine. The thread talks to the other ranks' threads over a process group of their own. An error is agreed
on by all ranks in `commit`, logged at once, and raised on all of them by the next call that comes here: training steps
do not look, because ranks would see it in different steps and then wait for each other in different collectives.

Invariant: at most one save is in flight; whoever asks for the next, loads, destroys the engine or ends the process
waits for it.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from dataclasses import dataclass

from deepspeed.checkpoint.save import Save
from deepspeed.utils.logging import logger


@dataclass
class SaveTimes:
    """What the last save cost. `blocked_ms`: the caller waited; `total_ms`: until it was durable, 0 while on its way."""

    blocked_ms: float = 0.0
    waited_ms: float = 0.0
    """Part of `blocked_ms`: until the save before was done."""
    total_ms: float = 0.0
    nbytes: int = 0
    """Bytes of this rank's file."""


class Background:
    """The save in flight, if any."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        _alive.add(self)

    def start(self, save: Save, times: SaveTimes, begun: float) -> None:
        """Finish a filled save in a thread."""
        self._thread = threading.Thread(target=self._run, args=(save, times, begun), name="checkpoint-save")
        self._thread.start()

    def _run(self, save: Save, times: SaveTimes, begun: float) -> None:
        try:
            save.commit()
            times.total_ms = (time.perf_counter() - begun) * 1e3
        except BaseException as error:
            self._error = error
            logger.error("%s", error)

    def join(self) -> None:
        """Wait for the save in flight; its error stays."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()

    def wait(self) -> None:
        """Wait for the save in flight, and raise its error if it had one."""
        self.join()
        error, self._error = self._error, None
        if error is not None:
            raise error


_alive: weakref.WeakSet[Background] = weakref.WeakSet()


@atexit.register
def _wait_for_all() -> None:
    for background in list(_alive):
        background.join()
