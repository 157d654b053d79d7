"""The line between a job's coordinator and its members (a node's launcher, or one rank under MPI and Slurm).

`coordinator` has the listening end; `Link` is a member's end, used by `agent` and watched by `supervise`.

    coordinator -> member   {"nonce"}                    member -> coordinator   {"hello", "nonce", "mac"}
                            {"welcome": mac}
                            {"go": {master_addr, ...}}                           {"failed": a Failure}
                            {"stop": text, "code"}                               {"ended": code}
                            {"lost": name}               both, every BEAT_S      {"beat"}

One JSON object per line over TCP. Both sides prove that they know the job's token (HMAC-SHA256 over the other's nonce)
before anything they say counts; the token itself never travels here. Messages are data: nothing in them is executed,
and unknown ones are skipped.

Invariant: a member that hears nothing for LEASE_S, or whose connection ends, ends its ranks; a coordinator that hears
nothing from a member for LEASE_S takes it for lost. So a job ends everywhere, whatever dies and whatever is cut.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import select
import socket
import time
from collections.abc import Mapping
from typing import Any

from deepspeed.utils.errors import DeepSpeedError

BEAT_S = 2.0
"""Between two signs of life."""
LEASE_S = 10.0
"""Silence after which the other side counts as gone."""
MAX_LINE_NBYTES = 1 << 20
TOKEN_VARIABLE = "DS_CONTROL_TOKEN"

Message = dict[str, Any]


class LinkLostError(DeepSpeedError, ConnectionError):
    """The other side is gone, or says nothing."""


def new_token() -> str:
    """A token for one job."""
    return secrets.token_hex(16)


def proof(token: str, side: str, nonce: str, text: str = "") -> str:
    """What shows that `side` knows the token."""
    return hmac.new(token.encode(), f"{side}\n{nonce}\n{text}".encode(), "sha256").hexdigest()


def canonical(data: Mapping[str, Any]) -> str:
    """JSON in one spelling."""
    return json.dumps(data, sort_keys=True)


def encode(message: Message) -> bytes:
    """A message as it travels."""
    return json.dumps(message).encode() + b"\n"


class Lines:
    """Takes bytes, gives messages."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Message]:
        """The messages completed by `data`. Raises ValueError for what is no message."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE_NBYTES:
            raise ValueError("line too long")
        messages = [json.loads(line) for line in lines]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("not an object")
        return messages


def split_address(text: str) -> tuple[str, int]:
    """ "host:1234" or "[::1]:1234" -> (host, port)."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal():
        raise DeepSpeedError(f"--control {text!r} is not an address.\n  Write host:port.")
    return host.strip("[]"), int(port)


def address_towards(host: str) -> str | None:
    """This machine's address on the way to `host`; None where the name or the way is unknown. Sends nothing."""
    with contextlib.suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
                probe.connect(address)
                return str(probe.getsockname()[0])
    return None


def is_here(host: str) -> bool:
    """Whether `host` is this machine: one can listen at its address."""
    with contextlib.suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
                probe.bind(address)
                return True
    return False


class Link:
    """A member's end. Not thread-safe; its owner's loop calls `receive` when `fileno` is readable, and `beat`."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines = Lines()
        self._early: list[Message] = []
        self._heard_s = self._beat_s = time.monotonic()

    @classmethod
    def open(cls, address: str, token: str, hello: Message, *, timeout_s: float) -> Link:
        """Connect, however long the coordinator takes to come up, and introduce ourselves.

        Raises LinkLostError where nobody answers in time, DeepSpeedError where the coordinator refuses us.
        """
        host, port = split_address(address)
        until_s = time.monotonic() + timeout_s
        pause_s = 0.05
        while True:
            try:
                connection = socket.create_connection((host, port), timeout=min(5.0, timeout_s))
                break
            except OSError as error:
                if time.monotonic() + pause_s > until_s:
                    raise LinkLostError(
                        f"the job's coordinator at {address} cannot be reached from {socket.gethostname()}: {error}.\n"
                        "  With --no_ssh, start node 0, too. Let this node connect to that port (--control_port chooses "
                        "it, --control_addr the address), or start with --no_control."
                    ) from None
                time.sleep(pause_s)
                pause_s = min(1.0, pause_s * 2)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(LEASE_S)  # also bounds every send
        link = cls(connection)
        nonce = secrets.token_hex(16)
        theirs = link.expect("nonce")["nonce"]
        link.send({"hello": hello, "nonce": nonce, "mac": proof(token, "member", str(theirs), canonical(hello))})
        answer = link.expect("welcome", "refused")
        if "refused" in answer:
            raise DeepSpeedError(str(answer["refused"]))
        if not hmac.compare_digest(str(answer["welcome"]), proof(token, "coordinator", nonce)):
            raise LinkLostError(f"what answers at {address} is not this job's coordinator.\n  Is the port in use?")
        return link

    def fileno(self) -> int:
        """For selectors."""
        return self._connection.fileno()

    def expect(self, *kinds: str, timeout_s: float = LEASE_S) -> Message:
        """Wait for a message that has one of these keys; later ones are kept for `receive`."""
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s:
            waiting, self._early = self._early, []
            for index, message in enumerate(waiting):
                if message.keys() & set(kinds):
                    self._early = waiting[index + 1 :]
                    return message
            if select.select([self], [], [], 0.2)[0]:
                self._early = self.receive()
            self.beat()
        raise LinkLostError(f"no {' or '.join(kinds)} from the coordinator for {timeout_s:.0f} s.")

    def receive(self) -> list[Message]:
        """What has come. Raises LinkLostError where the connection has ended."""
        early, self._early = self._early, []
        if early or not select.select([self], [], [], 0)[0]:
            return early
        try:
            data = self._connection.recv(1 << 16)
            if not data:
                raise LinkLostError("the job's coordinator closed the connection.")
            self._heard_s = time.monotonic()
            return self._lines.feed(data)
        except (OSError, ValueError) as error:
            if isinstance(error, LinkLostError):
                raise
            raise LinkLostError(f"the connection to the job's coordinator broke: {error}.") from None

    def send(self, message: Message) -> None:
        """Send a message; one that cannot be sent is lost, which `receive` will notice."""
        with contextlib.suppress(OSError):
            self._connection.sendall(encode(message))

    def beat(self) -> None:
        """Give a sign of life if it is time. Raises LinkLostError where there was none from the other side."""
        now_s = time.monotonic()
        if now_s - self._beat_s >= BEAT_S:
            self._beat_s = now_s
            self.send({"beat": 1})
        if now_s - self._heard_s > LEASE_S:
            raise LinkLostError(f"no sign of life from the job's coordinator for {LEASE_S:.0f} s.")

    def close(self) -> None:
        """End the connection."""
        self._connection.close()
