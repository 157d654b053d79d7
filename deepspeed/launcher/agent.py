"""Taking part in a job on several nodes: introduce this node to the coordinator, wait for its word, run, say the end.

Used by `launch` (one member per node) and by `launcher_helper` (one per rank, under MPI and Slurm).

The first member proposes where ranks meet, because it runs where they will: its address as the other nodes see it, and
a port that is free there and is kept until the ranks run. So no launcher has to guess either from afar.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import math
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from deepspeed.launcher.control import Link, address_towards, split_address
from deepspeed.launcher.coordinator import hello_of_this_node
from deepspeed.launcher.failure import Failure
from deepspeed.launcher.job import Job
from deepspeed.utils.errors import DeepSpeedError
from deepspeed.utils.ports import is_free, reserve_port

DEFAULT_PORT = 29500
CONNECT_S = 10.0
"""For a coordinator that was there before this process was started."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Membership:
    """Which member of which job this process is."""

    address: str
    """host:port of the coordinator."""
    token: str
    index: int
    name: str
    """ "node b", "rank 3"."""
    connect_s: float
    """How long the coordinator may take to come up."""
    tells: bool = False
    """Whether this process writes why the coordinator stops it; else the coordinator's owner does, on the same terminal."""


def take_part(membership: Membership, make_job: Callable[[], Job], run: Callable[[Job, Link], int]) -> int:
    """Join, and `run` the job once everybody has; the exit code. Trouble in `make_job` stops all nodes, with its text.

    Raises LinkLostError where there is no coordinator.
    """
    with contextlib.ExitStack() as stack:
        more: dict[str, object] = {}
        trouble: DeepSpeedError | None = None
        try:
            job = make_job()
            if membership.index == 0:
                asked = job.master_port or None
                more["port"] = stack.enter_context(meeting_port(asked, may_choose=asked is None))
                more["address"] = own_address(list(job.world), membership.address)
        except DeepSpeedError as error:
            trouble = error
        hello = hello_of_this_node(membership.index, **more)
        link = stack.enter_context(
            contextlib.closing(Link.open(membership.address, membership.token, hello, timeout_s=membership.connect_s))
        )
        if trouble is not None:
            link.send({"failed": _cannot(membership, trouble).to_json()})
        answer = link.expect("go", "stop", timeout_s=math.inf)  # the coordinator knows how long others may take
        if "stop" in answer:
            if membership.tells:
                print(answer["stop"], end="", file=sys.stderr)
            link.send({"ended": int(answer["code"])})
            return int(answer["code"])
        meeting = answer["go"]
        job = dataclasses.replace(job, master_addr=meeting["master_addr"], master_port=meeting["master_port"])
        return run(job, link)


def _cannot(membership: Membership, trouble: DeepSpeedError) -> Failure:
    return Failure(who=membership.name, host=socket.gethostname(), code=None, what="cannot start", words=str(trouble))


def own_address(hosts: Sequence[str], coordinator: str) -> str | None:
    """This node's address as the other nodes see it; None if it does not have one that leaves the machine."""
    for host in (*hosts[1:], split_address(coordinator)[0]):
        address = address_towards(host)
        if address is not None and not ipaddress.ip_address(address).is_loopback:
            return address
    return None


@contextlib.contextmanager
def meeting_port(asked: int | None, *, may_choose: bool) -> Iterator[int]:
    """The port ranks meet at, kept from other launchers on this machine while open.

    `asked` is --master_port. Without it and with `may_choose`, another free port replaces a default that is taken.
    Raises DeepSpeedError where `asked` is taken.
    """
    port = asked or DEFAULT_PORT
    kept = reserve_port(port)
    if kept is None and asked is None and may_choose:
        kept = reserve_port(0)
    if kept is None and not is_free(port):
        raise DeepSpeedError(
            f"--master_port {port} is taken on this machine ({socket.gethostname()}).\n"
            "  Give another one, or leave the flag out to have a free one chosen."
        )
    with kept or contextlib.nullcontext():
        yield kept.getsockname()[1] if kept else port
