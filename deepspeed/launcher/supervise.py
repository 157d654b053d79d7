"""The worker processes of one node: start them, pass their output on, and end them all when one fails.

`launch.run_here` calls `Supervisor(workers).run()`. One thread, one loop over a selector: the workers' output, in whole lines,
of which the end of stderr is kept (stdout goes by itself where it is a terminal, so that scripts see one); a pipe that signals write to (SIGCHLD: a worker ended; SIGINT, SIGTERM, SIGHUP: stop); and, on
several nodes, the link to the job's coordinator, which then decides when a failure stops everybody.

    RUNNING  --Ctrl-C, here or at the job's launcher-->  INTERRUPTED (SIGINT to all trees, as a terminal would send it)
             --a worker failed, another signal, the link says so or is lost-->  STOPPING (SIGTERM to all trees)
    INTERRUPTED  --grace is over, or only what workers left behind still runs-->  STOPPING
    STOPPING     --grace is over-->  KILLED (SIGKILL to all trees)  -->  ENDED        a second signal: KILLED at once

Invariants. Every worker leads a process group of its own, so that its children end with it. No worker outlives this
process, however it ends: the kernel sends SIGKILL to a worker whose parent is gone (Linux, prctl(2)), and a leash, a
shell that waits on a pipe, to its group. The first failing rank's last words are the last thing written.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, NamedTuple

from deepspeed.launcher.control import BEAT_S, Link, LinkLostError
from deepspeed.launcher.failure import TAIL_NBYTES, Blame, Failure, last_words
from deepspeed.launcher.job import Worker
from deepspeed.launcher.outlet import HOLD_S, Outlet, WholeLines
from deepspeed.utils.errors import DeepSpeedError

GRACE_S = 15.0
"""Between SIGINT and SIGTERM, and between SIGTERM and SIGKILL."""
DRAIN_S = 1.0
"""How long to read on after the last worker ended, if a process it left behind holds its output open."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class State(enum.Enum):
    """What the supervisor is doing."""

    RUNNING = "running"
    """All workers run or ended well."""
    INTERRUPTED = "interrupted"
    """SIGINT was sent to every tree, so that a script's `except KeyboardInterrupt` runs; SIGTERM follows at the deadline."""
    STOPPING = "stopping"
    """SIGTERM was sent to every tree; SIGKILL follows at the deadline."""
    KILLED = "killed"
    """SIGKILL was sent to every tree."""


class _Process:
    """One worker while it runs; `pipes_stdout`: its stdout is read here, too."""

    def __init__(self, worker: Worker, pipes_stdout: bool) -> None:
        self.worker = worker
        self.tail = b""
        log = open(worker.log, "wb") if worker.log else None  # noqa: SIM115 - closed below, the child has its own
        try:
            self.popen = subprocess.Popen(
                worker.command,
                env=dict(worker.environ),
                stdout=log or (subprocess.PIPE if pipes_stdout else None),
                stderr=subprocess.STDOUT if log else subprocess.PIPE,
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )
        except OSError as error:
            command = worker.command[0]
            is_here = "/" not in command and Path(command).is_file()
            cure = (
                f"Write ./{command}" if is_here else "Give a script that exists (with --no_python: that is executable)"
            )
            raise DeepSpeedError(
                f"{worker.name} cannot be started: {command!r}: {error.strerror}.\n  {cure}."
            ) from None
        finally:
            if log:
                log.close()

    def read(self, stream: IO[bytes]) -> bytes:
        """What it wrote to one of its pipes since the last time; empty at the end."""
        chunk = os.read(stream.fileno(), TAIL_NBYTES)
        if stream is self.popen.stderr:
            self.tail = (self.tail + chunk)[-TAIL_NBYTES:]
        return chunk

    def rest(self) -> Iterator[bytes]:
        """What is still in stderr's pipe, up to as much as is kept: the last words of a process that has ended."""
        for _ in range(TAIL_NBYTES // 4096):
            if self.popen.stderr is None or not select.select([self.popen.stderr], [], [], 0)[0]:
                return
            yield self.read(self.popen.stderr)

    def failure(self) -> Failure:
        """How it failed, with the end of what it wrote."""
        return Failure(
            who=self.worker.name,
            host=socket.gethostname(),
            code=self.popen.returncode,
            words=last_words(_end_of(self.worker.log) if self.worker.log else self.tail),
            pid=self.popen.pid,
            log=str(self.worker.log or ""),
        )

    def signal_tree(self, number: int) -> None:
        """Send a signal to the worker and the processes it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, number)


class _Stream(NamedTuple):
    """One pipe of a worker, and where it goes on to."""

    process: _Process
    pipe: IO[bytes]
    lines: WholeLines


class Supervisor:
    """Runs workers to their end. `run` may be called once, in the main thread."""

    def __init__(
        self,
        workers: Sequence[Worker],
        *,
        grace_s: float = GRACE_S,
        link: Link | None = None,
        name: str = "",
        tells: bool = False,
    ) -> None:
        """With a `link`: the `name` this member has in the job, and whether it `tells` why the coordinator stops it."""
        self._workers = workers
        self._grace_s = grace_s
        self._link = link
        self._name = name
        self._tells = tells
        self._processes: list[_Process] = []
        self._state = State.RUNNING
        self._deadline_s = float("inf")
        self._blame = Blame()
        self._signals: list[int] = []
        self._late: list[str] = []
        """Who had not ended when the grace after SIGINT was over."""
        self._stopped_by: tuple[str, int] | None = None
        self._selector = selectors.DefaultSelector()
        self._stdout, self._stderr = Outlet(1), Outlet(2)
        self._streams: list[_Stream] = []
        self.has_lost_link = False
        """Whether the coordinator was gone before it said how the job ended."""

    def run(self) -> int:
        """Start all, wait for all; 0, or the first failing worker's code as a shell sees it, or 1 after a signal.

        With a link, where another node failed first, the code is the job's; the coordinator's owner writes the summary.
        """
        with signals_wake(self._selector, self._signals), self._selector, _Leash() as leash:
            try:
                if self._link:
                    self._selector.register(self._link, selectors.EVENT_READ)
                for worker in self._workers:
                    self._start(worker, leash)
                while self._is_busy():
                    self._turn()
                self._end_leftovers()
                self._drain()
            finally:
                self._kill_all()
        return self._result()

    def _result(self) -> int:
        first = self._blame.first
        code = first.exit_code if first else 1 if self._signals else 0
        if self._stopped_by is not None:
            text, code = self._stopped_by
        elif self._link is None:
            text = self._blame.summary()
            if self._signals and not text:
                late = f"{', '.join(self._late)} had not ended {self._grace_s:g} s later (--grace_period); " * bool(
                    self._late
                )
                text = f"\n---- stopped by {signal.Signals(self._signals[0]).name}; {late}all ranks were ended ----\n"
        else:
            text = ""
        sys.stdout.flush()
        self._stdout.flush(DRAIN_S)
        if self._stdout.num_lost:
            lost = f"\n---- {self._stdout.num_lost} bytes of the ranks' output could not be written: {self._stdout.why_lost} ----\n"
            self._stderr.write(lost.encode())
        self._stderr.write(text.encode())
        self._stderr.flush(DRAIN_S)
        if self._link:
            self._link.send({"ended": code})
        return code

    def _start(self, worker: Worker, leash: _Leash) -> None:
        is_one = len(self._workers) == 1  # whose lines nobody tears
        process = _Process(worker, pipes_stdout=not is_one and not os.isatty(1))
        self._processes.append(process)
        leash.hold(process.popen.pid)
        for pipe, outlet in ((process.popen.stdout, self._stdout), (process.popen.stderr, self._stderr)):
            if pipe is not None:
                self._streams.append(_Stream(process, pipe, WholeLines(outlet, 0.0 if is_one else HOLD_S)))
                self._selector.register(pipe, selectors.EVENT_READ, self._streams[-1])

    def _is_busy(self) -> bool:
        """Whether a worker runs, or, while stopping, a process that one of them left."""
        if any(process.popen.returncode is None for process in self._processes):
            return True
        if self._state is State.RUNNING and self._blame.failures and self._link and not self._signals:
            return True  # the coordinator's word is on its way, or its loss
        return self._state is State.STOPPING and _any_alive({process.popen.pid for process in self._processes})

    def _end_leftovers(self) -> None:
        """Workers that have ended may have left processes running; those in sessions of their own may stay."""
        is_left = self._state in (State.RUNNING, State.INTERRUPTED)
        if is_left and _any_alive({process.popen.pid for process in self._processes}):
            self._send_all(State.STOPPING, signal.SIGTERM)
            while self._is_busy():
                self._turn()

    def _turn(self) -> None:
        """Wait for something to happen, and see to it."""
        self._pass_on(self._wait_s())
        for process in self._processes:
            if process.popen.returncode is None and process.popen.poll():
                self._failed(process)
        if self._link:
            self._listen(self._link)
        if self._signals and self._link and self._state is State.RUNNING:
            what = f"asked to end by {signal.Signals(self._signals[0]).name}"
            self._tell_failure(Failure(who=self._name, host=socket.gethostname(), code=None, what=what))
        if self._signals or time.monotonic() >= self._blame.stop_at_s:
            self._stop(interrupts=self._signals[:1] == [signal.SIGINT])
        if len(self._signals) > 1 or (self._state is State.STOPPING and time.monotonic() >= self._deadline_s):
            self._kill_all()
        elif self._state is State.INTERRUPTED and time.monotonic() >= self._deadline_s:
            self._late = [process.worker.name for process in self._processes if process.popen.returncode is None]
            self._send_all(State.STOPPING, signal.SIGTERM)

    def _wait_s(self) -> float | None:
        """None: until something happens. What workers left behind sends no signal when it ends, so that is polled."""
        is_waiting = self._stdout.is_waiting or self._stderr.is_waiting or any(s.lines.holds_any for s in self._streams)
        if self._state is State.RUNNING and not is_waiting:
            beat = BEAT_S / 2 if self._link else float("inf")
            wait_s = min(beat, max(0.0, self._blame.stop_at_s - time.monotonic()))
            return None if wait_s == float("inf") else wait_s
        return min(0.05, max(0.0, self._deadline_s - time.monotonic()))

    def _pass_on(self, timeout_s: float | None) -> None:
        for outlet in (self._stdout, self._stderr):
            outlet.push()
        for key, _ in self._selector.select(timeout_s):
            if isinstance(key.data, _Stream):
                process, pipe, lines = key.data
                if lines.outlet.is_full:
                    time.sleep(0.02)  # the workers wait with us, and nothing else does
                    continue
                chunk = process.read(pipe)
                lines.write(chunk, time.monotonic())
                if not chunk:
                    lines.end()
                    self._selector.unregister(key.fileobj)
            elif key.fileobj is not self._link:
                os.read(key.fd, 4096)
        for stream in self._streams:
            stream.lines.let_go(time.monotonic())

    def _listen(self, link: Link) -> None:
        """Do what the coordinator says; without it, end."""
        try:
            for message in link.receive():
                if "stop" in message and self._stopped_by is None:
                    self._stopped_by = (str(message["stop"]) if self._tells else "", int(message["code"]))
                    self._stop(interrupts=message.get("interrupts") is True)
                elif "lost" in message and self._state is State.RUNNING:
                    for process in self._processes:
                        process.popen.send_signal(signal.SIGUSR1)
            link.beat()
        except LinkLostError as error:
            self._selector.unregister(link)
            self._link, self.has_lost_link = None, True
            self._stopped_by = (f"\n---- stopping this node's ranks: {error} ----\n", 1)
            self._stop()

    def _failed(self, process: _Process) -> None:
        if self._state is not State.RUNNING or self._signals:
            return
        for stream in self._streams:
            if stream.pipe is process.popen.stderr:
                for chunk in process.rest():
                    stream.lines.write(chunk, time.monotonic())
        ended = [other.worker.name for other in self._processes if other.popen.returncode == 0]
        failure = process.failure().after(ended)
        if self._link:
            self._tell_failure(failure)
        else:
            self._blame.add(failure, time.monotonic())

    def _tell_failure(self, failure: Failure) -> None:
        assert self._link is not None
        self._blame.failures.append(failure)  # without a time to stop: that is the coordinator's to say
        self._link.send({"failed": failure.to_json()})

    def _stop(self, *, interrupts: bool = False) -> None:
        """Ask all to end, if that was not done."""
        if self._state is State.RUNNING and interrupts:
            self._send_all(State.INTERRUPTED, signal.SIGINT)
        elif self._state is State.RUNNING:
            self._send_all(State.STOPPING, signal.SIGTERM)

    def _send_all(self, state: State, number: int) -> None:
        self._state = state
        self._deadline_s = time.monotonic() + self._grace_s
        for process in self._processes:
            process.signal_tree(number)

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
        while any(isinstance(key.data, _Stream) for key in self._selector.get_map().values()):
            if time.monotonic() > until_s:
                break
            self._pass_on(0.05)
        for stream in self._streams:
            stream.lines.end()


@contextlib.contextmanager
def signals_wake(selector: selectors.BaseSelector, noted: list[int]) -> Iterator[None]:
    """Have signals that ask to stop noted, and have them and SIGCHLD wake the selector; as before afterwards."""

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)

    def wake(number: int, frame: FrameType | None) -> None:
        """The wake-up descriptor does the work; a handler must be there for it to."""

    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    selector.register(ours, selectors.EVENT_READ)
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


class _Leash:
    """A shell that kills the workers' process groups when this process is gone without having let go of it.

    The kernel's own signal (`die_with_parent`) reaches a worker, but not what the worker has started.
    """

    _SCRIPT = 'g=; while read -r p; do [ "$p" = done ] && exit; g="$g -$p"; done; [ -z "$g" ] || kill -s KILL -- $g'

    def __enter__(self) -> _Leash:
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", self._SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def hold(self, group: int) -> None:
        """Put a process group on it."""
        self._say(f"{group}\n")

    def __exit__(self, *exception: object) -> None:
        self._say("done\n")
        assert self._shell.stdin is not None
        with contextlib.suppress(OSError):
            self._shell.stdin.close()
        self._shell.wait()

    def _say(self, line: str) -> None:
        assert self._shell.stdin is not None
        with contextlib.suppress(OSError):
            self._shell.stdin.write(line.encode())
            self._shell.stdin.flush()


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


def die_with(parent: int, number: int = signal.SIGKILL) -> None:
    """Ask the kernel to signal this process when `parent`, which started it, ends (Linux)."""
    if not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)
    if os.getppid() != parent:
        os._exit(1)


def die_with_parent(number: int = signal.SIGKILL) -> Callable[[], None]:
    """What a child does before it executes its command: `die_with` this process."""
    parent = os.getpid()
    return lambda: die_with(parent, number)


def adopt_orphans() -> set[int]:
    """Become the parent of whatever this process's children leave behind (Linux, prctl(2)); the children it has now."""
    if sys.platform.startswith("linux"):
        pr_set_child_subreaper = 36
        ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1)
    return _children()


def kill_children(but: set[int]) -> None:
    """Kill and reap all children but those, again and again, as theirs become ours."""
    for _ in range(100):
        pids = _children() - but
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _children() -> set[int]:
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    return {int(pid) for pid in path.read_text().split()} if path.exists() else set()
