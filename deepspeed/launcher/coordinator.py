"""The one place that knows how a job on several nodes is doing: who takes part, who failed first, when all has ended.

Runs as a thread of the `deepspeed` command (`remote`), or of node 0's where nodes are started by hand (`agent`).
Members, one launcher per node or one helper per rank, connect to it (`control` has the protocol).

    GATHERING  --all are here, and agree on versions-->  RUNNING  --a failure, a lost member, `stop`-->  STOPPING
    RUNNING    --all have ended with 0-->  DONE          STOPPING  --all have ended or are lost, or time is up-->  DONE

With `min_members` (elastic training) members start as they come, and losing some is no failure as long as so many are
left: the others are told, so that they form a smaller world.

Invariant: in every state something ends it: a start-up time, the members' leases, a deadline for stopping.
"""

from __future__ import annotations

import contextlib
import enum
import hmac
import logging
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from deepspeed.launcher.control import BEAT_S, LEASE_S, Lines, Message, canonical, encode, proof
from deepspeed.launcher.failure import Blame, Failure, listed
from deepspeed.utils.errors import DeepSpeedError

logger = logging.getLogger("DeepSpeed.launcher")
START_S = 120.0
"""How long all members may take to come."""
REMIND_S = 30.0
VERSIONS = ("deepspeed", "torch", "python")
"""What must be the same on all nodes."""


class State(enum.Enum):
    """Where a job is."""

    GATHERING = "gathering"
    """Not all members are here; nothing runs yet."""
    RUNNING = "running"
    """Everybody was told to go."""
    STOPPING = "stopping"
    """Everybody was told to stop."""
    DONE = "done"
    """Nobody is left; `code` and `summary` say how it ended."""


@dataclass(eq=False)
class _Member:
    """A connection, and who is behind it once that is proven."""

    connection: socket.socket
    address: str
    nonce: str
    heard_s: float
    lines: Lines = field(default_factory=Lines)
    index: int | None = None
    host: str = ""
    hello: Message = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Terms:
    """On which terms members come and stay, as `Coordinator` was given them."""

    token: str
    grace_s: float
    master: tuple[str, int]
    min_members: int | None
    start_s: float
    may_queue: bool
    check_versions: bool


class Coordinator:
    """Listens from its construction on; `start` begins to answer. `stop`, `failed` may be called from any thread."""

    def __init__(
        self,
        members: Sequence[str],
        token: str,
        *,
        grace_s: float,
        bind: tuple[str, int] = ("", 0),
        master: tuple[str, int] = ("", 0),
        min_members: int | None = None,
        start_s: float = START_S,
        may_queue: bool = False,
        check_versions: bool = True,
    ) -> None:
        """`members` are their names ("node b"); `master` is where ranks meet as far as the user said it ("", 0).

        With `may_queue` the time for members to come, `start_s`, begins with the first of them.
        """
        self._names = list(members)
        self._terms = _Terms(
            token=token,
            grace_s=grace_s,
            master=master,
            min_members=min_members,
            start_s=start_s,
            may_queue=may_queue,
            check_versions=check_versions,
        )
        self._blame = Blame()
        self._connections: set[_Member] = set()
        self._here: dict[int, _Member] = {}
        self._ended: dict[int, int] = {}
        self._lost: set[int] = set()
        self._calls: list[Callable[[], None]] = []
        self._wake, self._woken = socket.socketpair()
        try:
            self._listener = socket.create_server(bind, backlog=1024)
        except OSError as error:
            raise DeepSpeedError(
                f"--control_port {bind[1]} is taken on this machine ({error.strerror}).\n  Give another one to all nodes."
            ) from None
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._run, name="deepspeed-coordinator", daemon=True)
        self._deadline_s = self._remind_s = self._beat_s = 0.0
        self.state = State.GATHERING
        self.done = threading.Event()
        self.code = 0
        """The job's exit code, once done."""
        self.summary = ""
        """What went wrong, once done; empty if nothing."""

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._listener.getsockname()[1])

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self, text: str, code: int = 1, *, interrupts: bool = False) -> None:
        """End the job; `text` says why. `interrupts`: as Ctrl-C does, so that ranks may save first."""
        self._call(lambda: self._stop(text, code, interrupts=interrupts))

    def failed(self, index: int, failure: Failure) -> None:
        """Say that a member will not come. Ignored for one that is here: its connection tells more."""
        self._call(lambda: None if index in self._here else self._gone(index, failure))

    def is_complete(self) -> bool:
        """Whether every member has come, and it is only a matter of time until the coordinator knows their ends."""
        return not self.missing()

    def is_running(self) -> bool:
        """Whether members may come and stay."""
        return self.state in (State.GATHERING, State.RUNNING)

    def missing(self) -> list[str]:
        """The members that have not come yet."""
        return [name for index, name in enumerate(self._names) if index not in self._here and index not in self._ended]

    def join(self, timeout_s: float) -> None:
        """Wait for the thread."""
        self._thread.join(timeout_s)

    # ------------------------------------------------------------------------------------------------- the thread

    def _call(self, what: Callable[[], None]) -> None:
        self._calls.append(what)
        with contextlib.suppress(OSError):
            self._wake.send(b"x")

    def _run(self) -> None:
        now_s = time.monotonic()
        self._deadline_s, self._remind_s = now_s + self._terms.start_s, now_s + REMIND_S
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        try:
            while self.state is not State.DONE:
                self._turn()
        except BaseException:
            self.code, self.summary = 1, f"\nthe coordinator failed:\n{traceback.format_exc()}"
        finally:
            for member in list(self._connections):
                self._drop(member)
            for closed in (self._listener, self._wake, self._woken, self._selector):
                closed.close()
            self.done.set()

    def _turn(self) -> None:
        for key, _ in self._selector.select(0.25):
            if key.fileobj is self._listener:
                self._accept()
            elif key.fileobj is self._woken:
                self._woken.recv(4096)
            elif key.data in self._connections:
                self._read(key.data)
        while self._calls:
            self._calls.pop(0)()
        self._tick(time.monotonic())

    def _tick(self, now_s: float) -> None:
        if now_s - self._beat_s >= BEAT_S:
            self._beat_s = now_s
            self._tell({"beat": 1})
        for member in [m for m in self._connections if now_s - m.heard_s > LEASE_S]:
            self._hung_up(member, f"no sign of life for {LEASE_S:.0f} s: the machine died or its network is cut")
        if self.state is State.GATHERING:
            self._tick_gathering(now_s)
        elif self.state is State.RUNNING and now_s >= self._blame.stop_at_s:
            first = self._blame.first
            assert first is not None, "a time to stop comes with a failure"
            cannot_meet = self._terms.min_members is not None and "RendezvousConnectionError" in first.words
            self._stop(self._blame.summary() + (self._how_to_go_on() if cannot_meet else ""), first.exit_code)
        elif self.state is State.RUNNING and len(self._ended) + len(self._lost) >= self._expected():
            self._stop("", max(self._ended.values(), default=0))
        if self.state is State.STOPPING and (not self._here or now_s >= self._deadline_s):
            self.state = State.DONE

    def _expected(self) -> int:
        """How many members must have ended for the job to be over: all, or all that ever came to an elastic one."""
        return (
            len(self._names)
            if self._terms.min_members is None
            else len(self._ended) + len(self._lost) + len(self._here)
        )

    def _tick_gathering(self, now_s: float) -> None:
        first = self._blame.first
        if self._terms.may_queue and not self._here:
            self._deadline_s = self._remind_s = now_s + self._terms.start_s
        if first is not None and now_s >= self._blame.stop_at_s:
            self._stop(self._blame.summary(), first.exit_code)
        elif now_s >= self._deadline_s:
            missing = listed(self.missing()) or "some"
            text = f"---- {missing} did not report within {self._terms.start_s:.0f} s; nothing was started ----"
            self._stop(f"\n{text}\nIs the launcher started there, and may it connect to port {self.port} here?\n", 1)
        elif now_s >= self._remind_s:
            self._remind_s = now_s + REMIND_S
            logger.warning("waiting for %s", listed(self.missing()))

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, address = self._listener.accept()
            connection.settimeout(LEASE_S / 2)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            member = _Member(connection, address[0], secrets.token_hex(16), time.monotonic())
            self._connections.add(member)
            self._selector.register(connection, selectors.EVENT_READ, member)
            self._send(member, {"nonce": member.nonce})

    def _read(self, member: _Member) -> None:
        try:
            data = member.connection.recv(1 << 16)
            messages = member.lines.feed(data)
        except (OSError, ValueError, RecursionError):
            data, messages = b"", []
        member.heard_s = time.monotonic()
        for message in messages:
            try:
                self._take(member, message)
            except (KeyError, TypeError, ValueError, OverflowError):
                data = b""  # somebody who does not speak the protocol
        if not data and member in self._connections:
            self._hung_up(member, "its launcher ended without a word: killed, or the machine went down")

    def _take(self, member: _Member, message: Message) -> None:
        if member.index is None:
            self._admit(member, message)
        elif "failed" in message:
            failure = Failure.from_json(message["failed"]).after([self._names[index] for index in sorted(self._ended)])
            if self.state in (State.GATHERING, State.RUNNING):
                self._blame.add(failure, time.monotonic())
        elif "ended" in message:
            self._ended[member.index] = int(message["ended"])
            self._drop(member)

    def _admit(self, member: _Member, message: Message) -> None:
        hello = message["hello"]
        mac = proof(self._terms.token, "member", member.nonce, canonical(hello))
        index = int(hello["member"])
        if not hmac.compare_digest(str(message["mac"]), mac) or not 0 <= index < len(self._names):
            self._send(
                member,
                {
                    "refused": f"the job's coordinator on {socket.gethostname()} does not know this member: another job's, "
                    "or its token was not passed on.\n  With --no_ssh, give all nodes the same hostfile, filters, "
                    "--master_addr and --master_port."
                },
            )
            self._drop(member)
            return
        if index in self._here:
            text = f"{self._names[index]} takes part already (from {self._here[index].host}).\n  Start each node once."
            self._send(member, {"refused": text})
            self._drop(member)
            return
        member.index, member.hello, member.host = index, hello, str(hello.get("host", member.address))[:300]
        self._here[index] = member
        self._lost.discard(index)
        self._ended.pop(index, None)
        self._send(member, {"welcome": proof(self._terms.token, "coordinator", str(message["nonce"]))})
        logger.debug("%s is here (%s)", self._names[index], member.host)
        if self.state is State.STOPPING:
            self._send(member, {"stop": "the job is ending", "code": 1})
        elif self._terms.min_members is not None:
            self._check_version_of(member)
            self.state = State.RUNNING
            self._send(member, self._go())
        elif len(self._here) == len(self._names) and self.state is State.GATHERING:
            for other in self._here.values():
                self._check_version_of(other)
            if not self._blame.failures:
                self.state = State.RUNNING
                self._tell(self._go())

    def _go(self) -> Message:
        """Where ranks meet: what the user said, else what the first member proposes."""
        first = self._here.get(0)
        hello = first.hello if first else {}
        address = self._terms.master[0] or str(hello.get("address") or (first.address if first else ""))
        return {"go": {"master_addr": address, "master_port": int(self._terms.master[1] or hello.get("port") or 0)}}

    def _check_version_of(self, member: _Member) -> None:
        one = self._here[min(self._here)]
        differ = [name for name in VERSIONS if member.hello.get(name) != one.hello.get(name)]
        if not (differ and self._terms.check_versions):
            return
        assert member.index is not None, "admitted"
        text = "; ".join(
            f"{name} is {one.hello.get(name)} on {one.host} and {member.hello.get(name)} on {member.host}"
            for name in differ
        )
        cure = (
            "  Install the same versions on all nodes, or set DS_SKIP_VERSION_CHECK=1 if you know they work together."
        )
        failure = Failure(
            who=self._names[member.index],
            host=member.host,
            code=None,
            what="packages differ between nodes",
            words=f"{text}.\n{cure}",
        )
        self._blame.add(failure, time.monotonic())

    def _hung_up(self, member: _Member, how: str) -> None:
        index, host = member.index, member.host or member.address
        self._drop(member)
        if index is not None and index not in self._ended:
            failure = Failure(who=self._names[index], host=host, code=None, what="lost", words=f"{how}.")
            self._gone(index, failure, member)

    def _gone(self, index: int, failure: Failure, member: _Member | None = None) -> None:
        """A member will not come, or not come back by itself; the `member` is known where it had come."""
        if index in self._ended or index in self._lost or self.state in (State.STOPPING, State.DONE):
            return
        member = member or self._here.get(index)
        if member is not None:
            self._drop(member)
        self._lost.add(index)
        if self._terms.min_members is None:
            self._blame.add(failure, time.monotonic())
            return
        left = len(self._here)
        text = failure.words.rstrip(".")
        logger.warning("%s (%s): %s. %d of %d nodes are left", failure.who, failure.host, text, left, left + 1)
        could_come = len(self._names) - len(self._lost) - len(self._ended)
        if (self.state is State.RUNNING and left < self._terms.min_members) or could_come < self._terms.min_members:
            self._blame.add(failure, time.monotonic())
            self._stop(
                self._blame.summary()
                + f"{left} nodes are left, fewer than --min_elastic_nodes {self._terms.min_members}.\n",
                1,
            )
        elif member is not None and self._is_at_master(member):
            self._blame.add(failure, time.monotonic())
            self._stop(self._blame.summary() + self._how_to_go_on(), 1)
        else:
            self._tell({"lost": failure.who})

    def _is_at_master(self, member: _Member) -> bool:
        """Whether ranks meet at this member's node, as far as its names and address tell."""
        assert member.index is not None, "admitted"
        node = self._names[member.index].removeprefix("node ")
        return self._terms.master[0] in (node, member.host, member.address, member.hello.get("address"))

    def _how_to_go_on(self) -> str:
        """For an elastic job without its meeting point."""
        return (
            f"The nodes of an elastic job meet at --master_addr {self._terms.master[0]}; without that node it cannot go on.\n"
            "  Start it again with --master_addr of a node that runs; the script goes on from its last checkpoint.\n"
        )

    def _stop(self, text: str, code: int, *, interrupts: bool = False) -> None:
        if self.state in (State.STOPPING, State.DONE):
            return
        self.state, self.code, self.summary = State.STOPPING, code, text
        self._deadline_s = time.monotonic() + self._terms.grace_s * (2 if interrupts else 1) + LEASE_S / 2
        self._tell({"stop": text, "code": code, "interrupts": interrupts})

    def _tell(self, message: Message) -> None:
        for member in list(self._here.values()):
            self._send(member, message)

    def _send(self, member: _Member, message: Message) -> None:
        with contextlib.suppress(OSError):  # who cannot be reached is noticed by its silence
            member.connection.sendall(encode(message))

    def _drop(self, member: _Member) -> None:
        self._connections.discard(member)
        if member.index is not None and self._here.get(member.index) is member:
            del self._here[member.index]
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(member.connection)
        member.connection.close()


def hello_of_this_node(index: int, **more: Any) -> Message:
    """How a member introduces itself: its index, its host, the versions that must agree. Imports no torch."""
    import platform
    from importlib import metadata

    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = "not installed"
    python = ".".join(platform.python_version_tuple()[:2])
    versions = {"deepspeed": sys.modules["deepspeed"].__version__, "torch": torch, "python": python}
    return {"member": index, "host": socket.gethostname(), **versions, **more}
