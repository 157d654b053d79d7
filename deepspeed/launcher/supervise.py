"""The worker processes of one node: start them, pass their output on, and end them all when one fails.

`launch.LocalBackend` calls `Supervisor(workers).run()`. One thread, one loop over a selector: the workers' stderr, of
which the end is kept, and a pipe that signals write to (SIGCHLD: a worker ended; SIGINT, SIGTERM, SIGHUP: stop).

    RUNNING  --a worker failed, or a signal-->  STOPPING (SIGTERM to all trees)  --grace is over, or a second
    signal-->  SIGKILL to all trees  -->  ENDED

Invariants. Every worker leads a process group of its own, so that its children end with it. No worker outlives this
process, however it ends: the kernel sends SIGKILL to a worker whose parent is gone (Linux, prctl(2)). The first
failing rank's last words are the last thing written.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from deepspeed.launcher.job import Worker
from deepspeed.utils.errors import DeepSpeedError

GRACE_S = 30.0
"""Between SIGTERM and SIGKILL."""
TAIL_NBYTES = 1 << 16
"""How much of a worker's stderr is kept."""
TAIL_LINES = 20
"""How much of that is shown where there is no traceback in it."""
DRAIN_S = 1.0
"""How long to read on after the last worker ended, if a process it left behind holds its stderr open."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_REASONS: Mapping[int, str] = {
    signal.SIGKILL: "killed from outside, probably because memory ran out; the kernel's log (dmesg) has the details",
    signal.SIGBUS: "bus error, often a small /dev/shm; in a container, start it with a larger --shm-size",
    signal.SIGSEGV: "invalid memory access in native code",
    signal.SIGABRT: "native code gave up: a failed assertion, an uncaught C++ exception or a communication watchdog",
    signal.SIGTERM: "asked to end from outside, for example by the job scheduler",
    signal.SIGINT: "interrupted",
    signal.SIGILL: "illegal instruction: a binary built for another CPU",
    signal.SIGFPE: "arithmetic error in native code, such as an integer division by zero",
}
_TRACEBACK = re.compile(rb"^.*Traceback \(most recent call last\):", re.MULTILINE)
_CHAINED = (b"During handling of the above exception", b"The above exception was the direct cause")


def describe_exit(code: int) -> str:
    """An exit code in words: -9 or 137 -> "exit code -9, SIGKILL: killed from outside, ..."."""
    number = -code if code < 0 else code - 128
    if code in range(0, 129):
        return f"exit code {code}"
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"exit code {code}"
    reason = _REASONS.get(number)
    return f"exit code {code}, {name}" + (f": {reason}" if reason else "")


def shell_code(code: int) -> int:
    """The exit code to leave with: of a worker that signal s killed, 256 - s."""
    return code if code >= 0 else 256 + code


def last_words(stderr: bytes) -> str:
    """The last traceback in what a worker wrote, with the exceptions it came from; without one, the last lines."""
    starts = [match.start() for match in _TRACEBACK.finditer(stderr)]
    while len(starts) > 1 and any(phrase in stderr[starts[-2] : starts[-1]] for phrase in _CHAINED):
        starts.pop()
    if starts:
        return stderr[starts[-1] :].decode(errors="replace").rstrip()
    return "\n".join(stderr.decode(errors="replace").rstrip().splitlines()[-TAIL_LINES:])


class State(enum.Enum):
    """What the supervisor is doing."""

    RUNNING = "running"
    """All workers run or ended well."""
    STOPPING = "stopping"
    """SIGTERM was sent to every tree; SIGKILL follows at the deadline."""
    KILLED = "killed"
    """SIGKILL was sent to every tree."""


class _Process:
    """One worker while it runs."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.tail = b""
        log = open(worker.log, "wb") if worker.log else None  # noqa: SIM115 - closed below, the child has its own
        try:
            self.popen = subprocess.Popen(
                worker.command,
                env=dict(worker.environ),
                stdout=log,
                stderr=subprocess.STDOUT if log else subprocess.PIPE,
                start_new_session=True,
                preexec_fn=_die_with_parent(),
            )
        except OSError as error:
            raise DeepSpeedError(
                f"rank {worker.rank} cannot be started: {worker.command[0]!r}: {error.strerror}.\n"
                "  Give a script that exists (with --no_python: that is executable)."
            ) from None
        finally:
            if log:
                log.close()

    def read(self) -> bytes:
        """What it wrote to stderr since the last time; empty at the end."""
        assert self.popen.stderr is not None, "only a worker without a log has a pipe"
        chunk = os.read(self.popen.stderr.fileno(), TAIL_NBYTES)
        self.tail = (self.tail + chunk)[-TAIL_NBYTES:]
        return chunk

    def last_words(self) -> str:
        """The end of what it wrote."""
        if self.worker.log:
            return last_words(_end_of(self.worker.log))
        return last_words(self.tail)

    def signal_tree(self, number: int) -> None:
        """Send a signal to the worker and the processes it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, number)


class Supervisor:
    """Runs workers to their end. `run` may be called once, in the main thread."""

    def __init__(self, workers: Sequence[Worker], *, grace_s: float = GRACE_S) -> None:
        self._workers = workers
        self._grace_s = grace_s
        self._processes: list[_Process] = []
        self._state = State.RUNNING
        self._deadline_s = float("inf")
        self._first_failed: _Process | None = None
        self._signals: list[int] = []
        self._selector = selectors.DefaultSelector()

    def run(self) -> int:
        """Start all, wait for all; 0, or the first failing worker's code as a shell sees it, or 1 after a signal."""
        with self._signals_wake(), self._selector:
            try:
                for worker in self._workers:
                    self._start(worker)
                while self._is_busy():
                    self._turn()
                self._drain()
            finally:
                self._kill_all()
        if self._first_failed is not None:
            self._report(self._first_failed)
            return shell_code(self._first_failed.popen.returncode)
        return 1 if self._signals else 0

    def _start(self, worker: Worker) -> None:
        process = _Process(worker)
        self._processes.append(process)
        if process.popen.stderr is not None:
            self._selector.register(process.popen.stderr, selectors.EVENT_READ, process)

    def _is_busy(self) -> bool:
        """Whether a worker runs, or, while stopping, a process that one of them left."""
        if any(process.popen.returncode is None for process in self._processes):
            return True
        return self._state is State.STOPPING and _any_alive({process.popen.pid for process in self._processes})

    def _turn(self) -> None:
        """Wait for something to happen, and see to it."""
        self._pass_on(self._wait_s())
        for process in self._processes:
            if process.popen.returncode is None and process.popen.poll():
                self._failed(process)
        if self._signals:
            self._stop(hurry=len(self._signals) > 1)
        if self._state is State.STOPPING and time.monotonic() >= self._deadline_s:
            self._kill_all()

    def _wait_s(self) -> float | None:
        """None: until something happens. What workers left behind sends no signal when it ends, so that is polled."""
        if self._state is State.RUNNING:
            return None
        return min(0.05, max(0.0, self._deadline_s - time.monotonic()))

    def _pass_on(self, timeout_s: float | None) -> None:
        for key, _ in self._selector.select(timeout_s):
            if isinstance(key.data, _Process):
                chunk = key.data.read()
                if chunk:
                    _write(chunk)
                else:
                    self._selector.unregister(key.fileobj)
            else:
                os.read(key.fd, 4096)

    def _failed(self, process: _Process) -> None:
        if self._first_failed is None and not self._signals:
            self._first_failed = process
            self._stop(hurry=False)

    def _stop(self, *, hurry: bool) -> None:
        if self._state is State.RUNNING:
            self._state = State.STOPPING
            self._deadline_s = time.monotonic() + self._grace_s
            for process in self._processes:
                process.signal_tree(signal.SIGTERM)
        if hurry:
            self._deadline_s = 0.0

    def _kill_all(self) -> None:
        if self._state is State.RUNNING and all(process.popen.returncode == 0 for process in self._processes):
            return
        self._state = State.KILLED
        for process in self._processes:
            process.signal_tree(signal.SIGKILL)
            process.popen.wait()

    def _drain(self) -> None:
        """Pass on what workers wrote before they ended."""
        until_s = time.monotonic() + DRAIN_S
        while any(isinstance(key.data, _Process) for key in self._selector.get_map().values()):
            if time.monotonic() > until_s:
                return
            self._pass_on(0.05)

    def _report(self, process: _Process) -> None:
        code = process.popen.returncode
        where = f"host {socket.gethostname()}, pid {process.popen.pid}"
        words = process.last_words()
        lines = ["", f"---- rank {process.worker.rank} failed first ({where}): {describe_exit(code)} ----"]
        if process.worker.log:
            lines.append(f"its output is in {process.worker.log}")
        if words:
            lines.append(words)
        if shell_code(code) > 128 or not words:
            lines.append(f"rank {process.worker.rank}: {describe_exit(code)}")
        sys.stdout.flush()
        _write(("\n".join(lines) + "\n").encode())

    @contextlib.contextmanager
    def _signals_wake(self) -> Iterator[None]:
        """Have signals noted and wake the selector; as before afterwards."""

        def note(number: int, frame: FrameType | None) -> None:
            self._signals.append(number)

        def wake(number: int, frame: FrameType | None) -> None:
            """The wake-up descriptor does the work; a handler must be there for it to."""

        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._selector.register(ours, selectors.EVENT_READ)
        # A signal that is ignored stays so: that is how nohup and background jobs of a shell are protected.
        heeded = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, note) for number in heeded}
        before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, wake)
        descriptor = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(descriptor)
            for number, handler in before.items():
                signal.signal(number, handler)
            ours.close()
            theirs.close()


def _write(data: bytes) -> None:
    """To stderr, unless nobody reads it any more."""
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(2, data) :]


def _end_of(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_NBYTES))
        return file.read()


def _any_alive(groups: set[int]) -> bool:
    """Whether a process of these groups still runs; one that only waits to be reaped does not."""
    if not sys.platform.startswith("linux"):
        return False
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, group = path.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if int(group) in groups and state not in "ZX":
                return True
    return False


def _die_with_parent() -> Callable[[], None] | None:
    """What a worker does before it executes its command: ask the kernel to kill it when this process ends."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()
    pr_set_pdeathsig = 1

    def ask() -> None:
        prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return ask
