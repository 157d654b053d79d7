"""Writing to the terminal or a pipe without ever waiting for its reader. Used by `supervise` and `remote`.

A reader that stops (Ctrl-S, a pager, ssh over a network that is cut) must not keep a supervisor from noticing that a
rank died or that the job is over. So what cannot be written now is kept, and the loop goes on; its owner stops reading
from workers while `is_full`, and the workers wait instead. Source: pipe(7), a pipe that poll(2) calls writable takes at
least PIPE_BUF bytes.
"""

from __future__ import annotations

import os
import select
import sys
import time

HOLD_S = 0.25
"""How long the beginning of a line waits for its end: a prompt has none, and `python -u` writes the arguments of one print one by one."""

PIPE_BUF = 4096
FULL_NBYTES = 1 << 16


def open_standard_streams() -> None:
    """Where 0, 1 or 2 were closed by whoever started us, have them lead nowhere: a pipe of ours must not be one of them."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free: this one
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 - open as long as we run
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


class Outlet:
    """One file descriptor of this process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._waiting = bytearray()
        self.num_lost, self.why_lost = 0, ""
        """Bytes that could not be written, such as to a disk that is full; where nobody reads any more nothing is lost."""
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    @property
    def is_full(self) -> bool:
        """Whether the reader is so far behind that no more should be taken from workers."""
        return len(self._waiting) >= FULL_NBYTES

    @property
    def is_waiting(self) -> bool:
        """Whether anything is left to write."""
        return bool(self._waiting)

    def write(self, data: bytes) -> None:
        """Write now what can be written now."""
        self._waiting += data
        self.push()

    def push(self) -> None:
        """Write of the rest what can be written now. Where that fails, all of it is dropped."""
        while self._waiting and self._poll.poll(0):
            try:
                written = os.write(self._descriptor, self._waiting[:PIPE_BUF])
            except OSError as error:
                if not isinstance(error, BrokenPipeError):
                    self.num_lost += len(self._waiting)
                    self.why_lost = error.strerror or str(error)
                self._waiting.clear()
                return
            del self._waiting[:written]

    def flush(self, timeout_s: float) -> None:
        """Wait until all is written, but not longer than this."""
        until_s = time.monotonic() + timeout_s
        self.push()
        while self._waiting and time.monotonic() < until_s:
            self._poll.poll(50)
            self.push()


def cut_at_line(data: bytes, *, is_end: bool) -> tuple[bytes, bytes]:
    """Complete lines, which end with a newline or (progress bars) a carriage return, and the rest, up to FULL_NBYTES."""
    cut = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
    if is_end or len(data) - cut > FULL_NBYTES:
        cut = len(data)
    return data[:cut], data[cut:]


class WholeLines:
    """One of several streams that go to one outlet, line by line, so that none is torn by another's."""

    def __init__(self, outlet: Outlet, hold_s: float = HOLD_S) -> None:
        self.outlet = outlet
        self._hold_s = hold_s
        self._held = b""
        self._since_s = 0.0

    @property
    def holds_any(self) -> bool:
        """Whether a line is here whose end is not."""
        return bool(self._held)

    def write(self, data: bytes, now_s: float) -> None:
        """Pass on complete lines; hold the rest."""
        lines, rest = cut_at_line(self._held + data, is_end=not self._hold_s)
        if lines or not self._held:
            self._since_s = now_s
        self._held = rest
        if lines:
            self.outlet.write(lines)

    def let_go(self, now_s: float) -> None:
        """Pass on what was held for too long."""
        if self._held and now_s - self._since_s >= self._hold_s:
            self.end()

    def end(self) -> None:
        """Pass on what is held: no more is to come."""
        held, self._held = self._held, b""
        if held:
            self.outlet.write(held)
