"""Ctrl-C in jobs of several ranks: all of them get KeyboardInterrupt at the same place of the program.

Started beside the watchdog by `init_distributed`; `engine.step`, `train_batch` and `save_checkpoint` run inside `HELD`.
SIGINT reaches ranks at different places. One that raises at once goes to its `except KeyboardInterrupt` and saves, with
collectives; another is inside of a step's collective, cannot hear of a signal there, and waits for the first for ever: the
checkpoint is lost. So the end of each step and of each save is a *gate*, counted on every rank, and:

    signal   a thread, which a blocked main thread does not keep, writes the number of gates passed to the store   all ranks
    gate     waits until all have written; KeyboardInterrupt is raised at gate max(written) + 1, on every rank     all ranks

No rank can have passed that gate unseen: what the thread reads is written before the main thread looks whether a signal
came. A rank that meets no gate in time (it loads data, or it alone got the signal), or gets a second signal, raises where
it stands. Its next save then asks the others first whether they come, rather than wait in a collective that they never
enter. One rank alone raises where it stands, except inside of `HELD`, so that no half of a step is saved.

Invariant: a gate costs two attributes until a signal comes. A handler of the script's own is left alone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from deepspeed.utils.errors import CheckpointError
from deepspeed.utils.launch_env import GRACE_VARIABLE
from deepspeed.utils.logging import logger

OTHERS_GRACE_S = 30.0
"""torchrun's, from the signal to SIGKILL."""
LOOK_S = 0.02
"""Between looks, after a signal."""
START_S = 1.0
"""How long the main thread waits for the thread to take a signal up."""


class Interrupts:
    """What one process knows of SIGINT. `open_store` is called in the thread; None for one rank alone."""

    def __init__(
        self, open_store: Callable[[], Any] | None, rank: int, world_size: int, grace_s: float | None = None
    ) -> None:
        self._open_store = open_store
        self._store: Any = None
        self._rank, self._world_size = rank, world_size
        self._grace_s = grace_s or float(os.environ.get(GRACE_VARIABLE, OTHERS_GRACE_S))
        self._pid = os.getpid()
        self._num_rounds = 0
        self._num_gates = 0
        self._is_held = False
        self._is_pending = False
        """A signal came, and KeyboardInterrupt was not raised for it."""
        self._was_heard = False
        """The same, as the handler knows it: a second signal finds it set."""
        self._until_s = 0.0
        self._gate: int | None = None
        self._has_gate = threading.Event()
        self._is_apart = False
        """The last KeyboardInterrupt was not raised at a gate."""
        self._ours, self._theirs = socket.socketpair()
        self._thread = threading.Thread(target=self._listen, name="deepspeed-interrupts", daemon=True)

    def start(self) -> bool:
        """Take SIGINT over; False where a handler or a wake-up descriptor of somebody else's is there."""
        if threading.current_thread() is not threading.main_thread():
            return False
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            return False
        if self._open_store is not None:
            self._theirs.setblocking(False)
            before = signal.set_wakeup_fd(self._theirs.fileno(), warn_on_full_buffer=False)
            if before != -1:
                signal.set_wakeup_fd(before)
                return False
            self._thread.start()
        signal.signal(signal.SIGINT, self._handle)
        return True

    def stop(self) -> None:
        """Give SIGINT back."""
        if signal.getsignal(signal.SIGINT) == self._handle:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._thread.is_alive():
            if signal.set_wakeup_fd(-1) != self._theirs.fileno():
                logger.debug("the wake-up descriptor was replaced")
            self._theirs.send(b"\0")
            self._thread.join(1.0)
        self._ours.close()
        self._theirs.close()

    def __enter__(self) -> None:
        self._is_held = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_held = False
        if kind is None:
            self._num_gates += 1
        if self._is_pending or self._was_heard:
            self._meet()

    def before_save(self) -> None:
        """Refuse a save in which other ranks will not take part. Raises CheckpointError."""
        if self._store is None or not self._num_rounds or self._is_pending:
            return
        self._store.set(self._key(f"saves/{self._rank}"), "")
        if not self._is_apart:
            return
        self._is_apart = False
        missing = self._missing("saves/", time.monotonic() + self._grace_s / 4)
        if missing:
            raise CheckpointError(
                f"save_checkpoint after Ctrl-C: rank {', '.join(map(str, missing))} has not come within "
                f"{self._grace_s / 4:.3g} s. The interrupt met ranks at different places, and it may be inside of a "
                "collective that this rank has left.\n  Nothing was written, and earlier checkpoints are whole. A rank "
                f"waits {2 * self._grace_s / 3:.3g} s for the end of its step: a longer --grace_period of the launcher "
                "gives it more."
            )

    def _key(self, name: str) -> str:
        return f"{self._num_rounds}/{name}"

    def _missing(self, name: str, until_s: float, goes_on: Callable[[], bool] = lambda: True) -> list[int]:
        """The ranks that have not written `name` at that time."""
        missing = list(range(self._world_size))
        while True:
            missing = [rank for rank in missing if not self._store.check([self._key(f"{name}{rank}")])]
            if not missing or time.monotonic() >= until_s or not goes_on():
                return missing
            time.sleep(LOOK_S)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Python's handler, in the main thread."""
        if os.getpid() != self._pid:  # a child made by fork
            if multiprocessing.current_process().daemon:
                return  # a data loader's worker, which its parent ends, and needs until then
            raise KeyboardInterrupt
        defers = self._num_gates > 0 if self._open_store is not None else self._is_held
        if self._was_heard or not defers:
            self._raise(apart=True)
        self._was_heard = True

    def _raise(self, *, apart: bool) -> None:
        self._is_pending, self._was_heard, self._is_apart = False, False, apart
        raise KeyboardInterrupt

    def _meet(self) -> None:
        """At a gate, after a signal."""
        if self._open_store is None:
            self._raise(apart=False)
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGINT) != self._handle:  # the script's own by now
            self._is_pending = self._was_heard = False
            return
        looked_s = time.monotonic()
        while not self._is_pending and time.monotonic() - looked_s < START_S:
            time.sleep(LOOK_S)  # the thread is about to
        is_told = self._is_pending and self._has_gate.wait(max(0.0, self._until_s - time.monotonic()))
        if not is_told or self._gate is None:
            self._raise(apart=True)
        elif self._num_gates >= self._gate:
            self._raise(apart=False)

    # The thread. ---------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        while True:
            numbers = self._ours.recv(4096)
            if not numbers or 0 in numbers:
                return
            if signal.SIGINT not in numbers or not self._num_gates:
                continue
            try:
                self._agree()
            except Exception as error:  # the store ends with the process that keeps it
                logger.debug("no agreement on an interrupt: %s", error)
            if self._is_pending:
                self._is_pending, self._was_heard = False, True  # so that the handler raises
                self._has_gate.set()
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            time.sleep(LOOK_S)
            if select.select([self._ours], [], [], 0)[0] and 0 in self._ours.recv(4096):  # this signal's, or a second's
                return

    def _agree(self) -> None:
        """Learn at which gate to raise, and wait until the main thread has, or the time is over."""
        self._num_rounds += 1
        self._gate = None
        self._has_gate.clear()
        self._until_s = time.monotonic() + 2 * self._grace_s / 3
        self._is_pending = True  # before the gates are read: see the module's docstring
        passed = self._num_gates
        if self._rank == 0:
            logger.warning("Ctrl-C: KeyboardInterrupt is raised when the step under way has ended on all ranks.")
        assert self._open_store is not None
        self._store = self._store or self._open_store()
        self._store.set(self._key(f"passed/{self._rank}"), str(passed))
        if not self._missing("passed/", self._until_s, lambda: self._is_pending):
            told = [int(self._store.get(self._key(f"passed/{rank}"))) for rank in range(self._world_size)]
            self._gate = max(told) + 1
            self._has_gate.set()
        while self._is_pending and time.monotonic() < self._until_s:
            time.sleep(LOOK_S)


class _Held:
    """Inside of it a step or a save is under way; its end is a gate."""

    def __init__(self) -> None:
        self.interrupts: Interrupts | None = None

    def __enter__(self) -> None:
        if self.interrupts is not None:
            self.interrupts.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self.interrupts is not None:
            self.interrupts.__exit__(*error)

    def before_save(self) -> None:
        """Refuse a save in which other ranks will not take part."""
        if self.interrupts is not None:
            self.interrupts.before_save()


HELD = _Held()
"""This process's."""


def heed(open_store: Callable[[], Any] | None, rank: int, world_size: int) -> None:
    """Start heeding SIGINT for this process's default group."""
    disregard()
    started = Interrupts(open_store, rank, world_size)
    if started.start():
        HELD.interrupts = started
    else:
        started.stop()


def disregard() -> None:
    """Stop it, if it was started."""
    running, HELD.interrupts = HELD.interrupts, None
    if running is not None:
        with contextlib.suppress(ValueError, RuntimeError, OSError):  # not in the main thread
            running.stop()


def _leave_in_child() -> None:
    """A child made by fork must not write to its parent's wake-up descriptor."""
    if HELD.interrupts is not None:
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_leave_in_child)
