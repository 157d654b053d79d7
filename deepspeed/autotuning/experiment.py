"""One trial as a process tree: started through the launcher, watched, ended, and what came of it.

Called by `ResourceManager`. The launcher runs in a session of its own; its ranks are its children, and end with it. A trial
is over when its process is; or when it has written its result and does not leave; or when it shows no progress for too long.
Then it is ended by its own ids: SIGTERM to the launcher, which ends its ranks, and SIGKILL to its session where that does not help. What a
script started in sessions of their own is told by a variable that all of a trial's processes inherit.

Invariant: when `run` returns, nothing that it started runs any more on this host, whatever ended it; where this process is killed, the
launcher gets SIGKILL from the kernel, and its ranks with it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspeed.autotuning.files import check_room, read_json, writing
from deepspeed.autotuning.stopped import passed_on, postponed
from deepspeed.launcher.supervise import die_with_parent

LEAVE_S = 10.0
"""For a script that has its result and goes on."""
GRACE_S = 10.0
"""From SIGTERM to SIGKILL."""
POLL_S = 0.05
ROOM_S = 1.0
"""Between two looks at whether a trial's folder can still be written to: without, neither its result nor its steps would come."""
MARK = "DEEPSPEED_TRIAL"
"""The variable; each trial has a value of its own."""


@dataclass(frozen=True)
class Limits:
    """Seconds without progress after which a trial is ended."""

    start_s: float
    """From the start to the engine."""
    step_s: float
    """From one step to the next; also to the first one."""


@dataclass(frozen=True)
class Ended:
    """How a trial ended."""

    code: int
    """Of the launcher; negative: the signal that killed it."""
    seconds: float
    saw_engine: bool
    """Whether an engine was built from the trial's configuration."""
    last_step: int
    start_s: float | None
    """Until the engine was there."""
    was_ended: str = ""
    """Why it was ended from here; empty where it ended by itself."""


def run(command: Sequence[str], folder: Path, result: Path, limits: Limits, environ: Mapping[str, str]) -> Ended:
    """Run a trial to its end. `result`: the file that it writes. Raises ResultsError where its folder cannot be written to, or no
    more while it runs."""
    progress = result.with_name(f"{result.name}.progress")
    mark = uuid.uuid4().hex
    with writing(folder):
        for left in (result, progress):
            left.unlink(missing_ok=True)
        with (folder / "stdout.log").open("wb") as out, (folder / "stderr.log").open("wb") as err:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**environ, MARK: mark},
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )
    try:
        watch = _Watch(process, result, progress, limits)
        why = watch.wait()
    finally:
        with postponed():
            end(process)
            end_marked(mark)
    if not result.is_file():
        check_room(folder)  # else its end would be taken for the configuration's
    return Ended(
        code=process.returncode,
        seconds=watch.passed_s(),
        saw_engine=watch.start_s is not None,
        last_step=watch.step,
        start_s=watch.start_s,
        was_ended=why,
    )


class _Watch:
    """Looks at a trial's files until something ends it."""

    def __init__(self, process: subprocess.Popen[bytes], result: Path, progress: Path, limits: Limits) -> None:
        self._process, self._result, self._progress, self._limits = process, result, progress, limits
        self._began_s = self._moved_s = self._room_at_s = time.monotonic()
        self.start_s: float | None = None
        self.step = -1

    def passed_s(self) -> float:
        """Since the start."""
        return time.monotonic() - self._began_s

    def wait(self) -> str:
        """Until the process is over, or has to be ended; then why."""
        while self._process.poll() is None:
            self._look()
            if self._result.is_file():
                return self._see_it_leave()
            still_s = time.monotonic() - self._moved_s
            limit_s = self._limits.start_s if self.start_s is None else self._limits.step_s
            if still_s > limit_s:
                return self._say(limit_s)
            if time.monotonic() >= self._room_at_s:
                check_room(self._result.parent)
                self._room_at_s = time.monotonic() + ROOM_S
            time.sleep(POLL_S)
        self._look()
        return ""

    def _look(self) -> None:
        said: Any = read_json(self._progress)
        if isinstance(said, dict) and said.get("step", -1) != self.step:
            self.step, self._moved_s = int(said["step"]), time.monotonic()
            if self.start_s is None:
                self.start_s = self._moved_s - self._began_s

    def _see_it_leave(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(LEAVE_S)
            return ""
        return "it had its result and went on"

    def _say(self, limit_s: float) -> str:
        if self.start_s is None:
            return f"no engine was built within {limit_s:.0f} s"
        return f"no step ended within {limit_s:.0f} s of step {self.step}"


def end(process: subprocess.Popen[bytes], grace_s: float = GRACE_S) -> None:
    """End a trial that still runs: the launcher first, which ends its ranks; then all of its session."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace_s)
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its id: the session was made for it, and it is not reaped yet
    process.wait()


def end_marked(mark: str, grace_s: float = GRACE_S) -> None:
    """End what a trial left running in sessions of its own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in marked(mark):
            with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's by now
                os.kill(pid, number)
        until_s = time.monotonic() + grace_s
        while marked(mark) and time.monotonic() < until_s:
            time.sleep(POLL_S)


def marked(mark: str) -> list[int]:
    """Processes that inherited a trial's variable, and have not ended."""
    found, own = [], f"{MARK}={mark}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if own in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


def become(command: Sequence[str]) -> int:
    """Run a command in this one's place: it gets the signals that this one gets, and ends with it. Its exit code."""
    process = subprocess.Popen(list(command), start_new_session=True, preexec_fn=die_with_parent())
    with passed_on(process.send_signal):
        return process.wait()


def as_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """A trial's environment: ours, without progress bars, which make its logs grow."""
    return {**environ, "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": environ.get("TQDM_DISABLE", "1")}
