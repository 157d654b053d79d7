"""Running a job on several nodes from here: start the programs, pass their output on, end them all, say what happened.

Called by `runner` with a `Plan` and a `Starter`. The programs (ssh per node, or one pdsh, mpirun or srun) are watched by
this module's loop; the members they bring up on the nodes report to a `Coordinator`, which runs in a thread beside it.

    programs' output  -->  our stdout and stderr, lines of a node's ssh marked with its name
    a program ends before its member reported  -->  Coordinator.failed
    SIGINT, SIGTERM, SIGHUP  -->  Coordinator.stop; a second one kills the programs at once
    the coordinator is done  -->  programs get a moment, then SIGTERM, then SIGKILL; the summary is written last

Invariant: no program outlives this process (prctl(2)), nor what it started in sessions of its own, as mpirun does ssh, and no member outlives its program or this process (`control`).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO

from deepspeed.launcher.coordinator import Coordinator
from deepspeed.launcher.failure import TAIL_NBYTES, Failure, describe_exit, last_words, shell_code
from deepspeed.launcher.outlet import Outlet, cut_at_line
from deepspeed.launcher.starters import Plan, Start, Starter
from deepspeed.launcher.starters.ssh import ssh_words
from deepspeed.launcher.supervise import (
    DRAIN_S,
    adopt_orphans,
    die_with_parent,
    kill_children,
    signals_wake,
)
from deepspeed.launcher.variables import shown_command
from deepspeed.utils.errors import LaunchError

logger = logging.getLogger("DeepSpeed.launcher")
LINGER_S = 5.0
"""How long a program may take to end once its members have."""
TERM_S = 2.0
"""Between SIGTERM and SIGKILL to a program."""
RETRY_S = 15.0
"""In elastic training: how long before a lost node is tried again."""
CHECK_S = 20.0


def check_reachable(hosts: Sequence[str], port: int | None) -> None:
    """Try ssh to every host at once. Raises LaunchError that names each one that cannot be reached, and why."""

    def attempt(host: str) -> str | None:
        try:
            tried = subprocess.run(
                [*ssh_words(host, port, ["-o", "PasswordAuthentication=no"]), "true"],
                capture_output=True,
                text=True,
                timeout=CHECK_S,
            )
        except subprocess.TimeoutExpired:
            return f"no answer within {CHECK_S:.0f} s"
        return None if tried.returncode == 0 else (tried.stderr.strip().splitlines() or ["ssh failed"])[-1]

    with ThreadPoolExecutor(min(64, len(hosts))) as pool:
        troubles = {host: trouble for host, trouble in zip(hosts, pool.map(attempt, hosts), strict=True) if trouble}
    if troubles:
        raise LaunchError(
            "\n".join(
                [f"{len(troubles)} of {len(hosts)} hosts cannot be reached by ssh without a password:"]
                + [f"  {host}: {trouble}" for host, trouble in troubles.items()]
                + ["  Install a key there (ssh-copy-id), mend the hostfile, or skip this check with --no_ssh_check."]
            )
        )


@dataclass
class _Program:
    """A program while it runs. `index` is the member it starts; None: all of them."""

    start: Start
    index: int | None
    popen: subprocess.Popen[bytes]
    tail: bytes = b""
    rest: dict[int, bytes] = field(default_factory=dict)
    """Of each stream, the beginning of a line whose end has not come yet."""


class RemoteRun:
    """One job. `run` may be called once, in the main thread."""

    def __init__(
        self, plan: Plan, starter: Starter, coordinator: Coordinator | None, *, retries_nodes: bool = False
    ) -> None:
        self._plan = plan
        self._starter = starter
        self._coordinator = coordinator
        self._retries = retries_nodes
        self._again_s: dict[int, float] = {}
        self._programs: list[_Program] = []
        self._hosts = list(plan.world)
        self._signals: list[int] = []
        self._heeded = 0
        self._selector = selectors.DefaultSelector()
        self._outlets = {1: Outlet(1), 2: Outlet(2)}
        self._first_code = 0

    def run(self) -> int:
        """Start, watch, end; the job's exit code."""
        with signals_wake(self._selector, self._signals), self._selector:
            not_ours = adopt_orphans()
            try:
                if self._coordinator:
                    self._coordinator.start()
                for index, start in enumerate(self._starter.command(self._plan)):
                    self._launch(start, index if start.host else None)
                while not self._is_over():
                    self._turn(1.0 if not any(outlet.is_waiting for outlet in self._outlets.values()) else 0.05)
                self._wind_down()
            finally:
                for program in self._programs:
                    _signal(program, signal.SIGKILL)
                    program.popen.wait()
                kill_children(but=not_ours)
        return self._result()

    def _launch(self, start: Start, index: int | None) -> None:
        logger.debug("%s", shown_command(start.argv, self._plan.variables))
        try:
            popen = subprocess.Popen(
                start.argv,
                env=dict(start.environ),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=die_with_parent(signal.SIGTERM),
            )
        except OSError as error:
            cure = "Check that it can be executed"
            if error.errno == errno.E2BIG:
                name, nbytes = max(((k, len(v)) for k, v in self._plan.variables.items()), key=lambda pair: pair[1])
                total = sum(len(k) + len(v) for k, v in self._plan.variables.items())
                cure = (
                    f"The {len(self._plan.variables)} variables for the nodes have {total} bytes together ({name} has "
                    f"{nbytes}); with the script's arguments a command may have 128 KiB. Put long values into files"
                )
            raise LaunchError(f"{start.argv[0]} cannot be started: {error.strerror}.\n  {cure}.") from None
        program = _Program(start, index, popen)
        self._programs.append(program)
        for number, stream in ((1, popen.stdout), (2, popen.stderr)):
            assert stream is not None
            self._selector.register(stream, selectors.EVENT_READ, (program, number))

    def _is_over(self) -> bool:
        if self._coordinator:
            return self._coordinator.done.is_set()
        return bool(self._signals) or self._first_code != 0 or all(p.popen.returncode == 0 for p in self._programs)

    def _turn(self, timeout_s: float) -> None:
        for outlet in self._outlets.values():
            outlet.push()
        if self._coordinator and self._coordinator.done.is_set():
            timeout_s = 0.05
        for key, _ in self._selector.select(min(timeout_s, 0.25)):
            if isinstance(key.data, tuple):
                self._pass_on(key.fileobj, *key.data)  # type: ignore[arg-type]
            else:
                os.read(key.fd, 4096)
        for program in self._programs:
            if program.popen.returncode is None and program.popen.poll() is not None:
                self._ended(program)
        self._heed_signals()
        if self._retries:
            self._try_again()

    def _pass_on(self, stream: IO[bytes], program: _Program, number: int) -> None:
        outlet = self._outlets[number]
        if outlet.is_full:
            time.sleep(0.02)
            return
        data = os.read(stream.fileno(), 1 << 16)
        if number == 2:
            program.tail = (program.tail + data)[-TAIL_NBYTES:]
        whole, program.rest[number] = cut_at_line(program.rest.get(number, b"") + data, is_end=not data)
        lines = whole.splitlines(keepends=True)
        if number == 2 and self._coordinator:
            for line in lines:
                failed = self._starter.failed_host(line)
                if failed and failed[0] in self._hosts:
                    self._failed_to_start(self._hosts.index(failed[0]), failed[1], program.tail)
        prefix = f"{program.start.host}: ".encode() if program.start.host else b""
        outlet.write(b"".join(prefix + line if line.strip(b"\r\n") else line for line in lines))
        if not data:
            self._selector.unregister(stream)
            stream.close()

    def _ended(self, program: _Program) -> None:
        """A program has ended: in order, or before its members could say so."""
        self._read_rest(program)
        code = program.popen.returncode
        if code and not self._first_code:
            self._first_code = shell_code(code)
        if self._coordinator is None or self._coordinator.done.is_set():
            return
        if program.index is not None:
            self._failed_to_start(program.index, code, program.tail)
        elif not self._coordinator.is_complete():
            words = last_words(program.tail)
            name = self._starter.name
            text = f"\n---- {name} ended before all of its ranks reported: {describe_exit(code)} ----\n"
            self._coordinator.stop(f"{text}{words}\n", shell_code(code) or 1)

    def _failed_to_start(self, index: int, code: int, tail: bytes) -> None:
        """Ignored by the coordinator for a member that has reported: its connection tells more."""
        assert self._coordinator is not None
        host = self._hosts[index]
        # The launcher itself ends with 2, and has said why.
        python = f"On {host}, this has to work:  cd {self._plan.cwd} && {self._plan.python} -c 'import deepspeed'"
        cure = {2: "", 255: f"ssh could not reach {host}, or its connection broke."}.get(code, python)
        mark = f"{host}: ".encode()  # one program for all nodes marks their lines
        own = b"\n".join(line[len(mark) :] for line in tail.splitlines() if line.startswith(mark))
        failure = Failure(
            who=f"node {host}",
            host=host,
            code=code if code > 0 else None,
            what=f"its launcher did not start ({describe_exit(code)})",
            words=f"{last_words(own or tail)}\n{cure}".strip(),
        )
        self._coordinator.failed(index, failure)
        if self._retries:
            self._again_s[index] = time.monotonic() + RETRY_S

    def _try_again(self) -> None:
        """Start lost nodes again: an elastic job takes them back."""
        assert self._coordinator is not None
        if not self._coordinator.is_running():
            return
        for index, at_s in list(self._again_s.items()):
            if time.monotonic() >= at_s:
                del self._again_s[index]
                logger.info("trying node %s again", self._hosts[index])
                self._launch(self._starter.command(self._plan)[index], index)

    def _heed_signals(self) -> None:
        new = self._signals[self._heeded :]
        self._heeded += len(new)
        if not new:
            return
        if self._coordinator and self._heeded == len(new):
            name = signal.Signals(new[0]).name
            text = f"\n---- stopped by {name} at the launcher; all ranks were ended ----\n"
            self._coordinator.stop(text, 1, interrupts=new[0] == signal.SIGINT)
        if self._heeded > 1:
            for program in self._programs:
                _signal(program, signal.SIGKILL)

    def _wind_down(self) -> None:
        """Let the programs end by themselves, then make them."""
        for number, wait_s in ((None, LINGER_S if self._coordinator else 0.0), (signal.SIGTERM, TERM_S)):
            for program in self._programs:
                if number is not None:
                    _signal(program, number)
            until_s = time.monotonic() + wait_s
            while time.monotonic() < until_s and any(p.popen.returncode is None for p in self._programs):
                self._turn(0.05)
        for program in self._programs:
            _signal(program, signal.SIGKILL)
            program.popen.wait()
        until_s = time.monotonic() + DRAIN_S
        while any(isinstance(k.data, tuple) for k in self._selector.get_map().values()) and time.monotonic() < until_s:
            self._turn(0.05)

    def _read_rest(self, program: _Program) -> None:
        """What an ended program wrote last belongs to its last words."""
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, tuple) and key.data[0] is program:
                os.set_blocking(key.fd, False)
                try:
                    while key.fd in self._selector.get_map() and not self._outlets[key.data[1]].is_full:
                        self._pass_on(key.fileobj, *key.data)  # type: ignore[arg-type]
                except BlockingIOError:
                    """A process it left behind still has the pipe."""

    def _result(self) -> int:
        sys.stdout.flush()
        self._outlets[1].flush(DRAIN_S)
        if self._coordinator is None:
            self._outlets[2].flush(DRAIN_S)
            return self._first_code or (1 if self._signals else 0)
        self._coordinator.join(DRAIN_S)
        self._outlets[2].write(self._coordinator.summary.encode())
        self._outlets[2].flush(DRAIN_S)
        return self._coordinator.code


def _signal(program: _Program, number: int) -> None:
    """Also to what the program has left behind: pdsh's ssh may outlive pdsh."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(program.popen.pid, number)
