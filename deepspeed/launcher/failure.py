"""What went wrong with a rank, which of several failures came first, and the words for it. Pure.

`supervise` makes a `Failure` of every worker that ends badly; `supervise` on one node and `coordinator` on several
collect them in a `Blame`, which says when the rest has to stop and which failure is to be shown.

Note [Consequences]
    When a rank dies, the others lose their connection to it and fail too, sometimes sooner: the one that raised may
    need seconds to free its memory, and its peers are told as soon as the first socket is closed. A failure whose last
    words speak of a lost peer is therefore a *consequence* until proven otherwise: the job goes on for `SETTLE_S`, and
    the first failure that is none is blamed. If none comes, the first one is.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

TAIL_NBYTES = 1 << 16
"""How much of a worker's stderr is kept."""
TAIL_LINES = 20
"""How much of that is shown where there is no traceback in it."""
LINE_LENGTH = 2000
"""How much of a line is shown."""
SETTLE_S = 2.0
"""How long to wait for the cause of a consequence."""

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
_SHELL_CODES: Mapping[int, str] = {
    126: "the command was found but cannot be executed",
    127: "command not found",
}
_TRACEBACK = re.compile(rb"^.*Traceback \(most recent call last\):", re.MULTILINE)
_CHAINED = (b"During handling of the above exception", b"The above exception was the direct cause")
_LOST_PEER = re.compile(
    r"Connection (closed|reset) by (peer|remote)|Connection refused|Broken pipe|Socket closed|remote process exited|"
    r"Timed out waiting \d+ms for (recv|send)|recvValueWithTimeout|DistNetworkError|DistStoreError|RendezvousConnectionError|"
    r"did not come to|NCCL communicator was aborted|store->get\(|Failed to (recv|send), got 0 bytes|"
    r"rank \d+ will send no more"  # comm.shared
)


def describe_exit(code: int) -> str:
    """An exit code in words: -9 or 137 -> "exit code -9, SIGKILL: killed from outside, ..."."""
    if code in _SHELL_CODES:
        return f"exit code {code}: {_SHELL_CODES[code]}"
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
    lines = stderr[starts[-1] if starts else 0 :].decode(errors="replace").rstrip().split("\n")
    return "\n".join(map(_clipped, lines if starts else lines[-TAIL_LINES:]))


def _clipped(line: str) -> str:
    return line if len(line) <= LINE_LENGTH else f"{line[:LINE_LENGTH]}... ({len(line)} characters)"


def listed(names: Sequence[str]) -> str:
    """The names, or the first of them."""
    return ", ".join([*names[:8], *(["..."] if len(names) > 8 else [])])


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """One rank, or one node's launcher, that ended badly."""

    who: str
    """ "rank 3", "node b"."""
    host: str
    code: int | None
    """As `subprocess` gives it; None for what was lost, not seen to end."""
    words: str = ""
    """The end of what it wrote, or what is known of it."""
    pid: int = 0
    log: str = ""
    """The file with its output, on its host."""
    what: str = ""
    """How it ended, where the code does not say."""
    before: str = ""
    """Who had ended without an error before it, if it looks like their loss."""

    @property
    def is_consequence(self) -> bool:
        """Whether it looks like the loss of another rank; see Note [Consequences]."""
        return self.code is not None and self.code > 0 and _LOST_PEER.search(self.words) is not None

    @property
    def exit_code(self) -> int:
        """The job's exit code if this is what ended it."""
        return 1 if self.code is None else shell_code(self.code)

    def after(self, ended: Sequence[str]) -> Failure:
        """This failure, where `ended` have ended without an error: others may have waited for them in vain."""
        if not (ended and self.is_consequence):
            return self
        return replace(self, before=", ".join(filter(None, [self.before, listed(ended)])))

    def to_json(self) -> dict[str, Any]:
        """As it travels."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Failure:
        """What `to_json` wrote; raises TypeError or ValueError for anything else."""
        code = data["code"]
        return Failure(
            who=str(data["who"])[:200],
            host=str(data["host"])[:300],
            code=None if code is None else int(code),
            words=str(data["words"])[-TAIL_NBYTES:],
            pid=int(data["pid"]),
            log=str(data["log"])[:4096],
            what=str(data["what"])[:4096],
            before=str(data["before"])[:4096],
        )

    def summary(self, others: Iterable[Failure] = ()) -> str:
        """What is shown last: who failed first and how, its last words, and who failed after it."""
        ending = self.what or ("lost" if self.code is None else describe_exit(self.code))
        pid = f", pid {self.pid}" if self.pid else ""
        lines = ["", f"---- {self.who} failed first (host {self.host}{pid}): {ending} ----"]
        if self.log:
            lines.append(f"its output is in {self.log}")
        if self.words:
            lines.append(self.words)
        if self.before:
            lines.append(
                f"ended before it, without an error: {self.before}. Do all ranks take the same number of steps?"
            )
        after = [f"{other.who} ({other.host})" for other in others if other != self]
        if after:
            lines.append(f"failed after it: {listed(after)}")
        if self.exit_code > 128 or not self.words:
            lines.append(f"{self.who}: {ending}")
        return "\n".join(lines) + "\n"


class Blame:
    """The failures of a job so far."""

    def __init__(self, settle_s: float = SETTLE_S) -> None:
        self._settle_s = settle_s
        self.failures: list[Failure] = []
        self.stop_at_s = float("inf")
        """When the rest has to be stopped, on the caller's clock."""

    def add(self, failure: Failure, now_s: float) -> None:
        """Note a failure."""
        self.failures.append(failure)
        self.stop_at_s = min(self.stop_at_s, now_s + (self._settle_s if failure.is_consequence else 0.0))

    @property
    def first(self) -> Failure | None:
        """The failure to show: the first that is no consequence, else the first; None while all is well."""
        causes = [failure for failure in self.failures if not failure.is_consequence]
        return next(iter(causes or self.failures), None)

    def summary(self) -> str:
        """The text for the end of the job; empty while all is well."""
        first = self.first
        return first.summary(self.failures) if first else ""
