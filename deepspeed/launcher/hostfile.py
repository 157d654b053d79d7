"""Which machines, and which of their devices: the hostfile and the include/exclude filter. Pure.

The runner reads a hostfile into a pool {host: slots}, filters it to {host: slot ids}, and hands that to every node as
"world info": JSON in URL-safe base64.

    line    := host WS+ "slots=" digits [anything]          "#..." and empty lines are skipped
    LIST    := NODE ("@" NODE)*        NODE := host [":" slot ("," slot)*]

Invariants. The order of hosts is that of the file, whatever the order in a filter; it is the order of ranks. A hostfile
is data: what is no host name and no IP address goes no further, so nothing in one reaches a shell or looks like a flag.
Source: RFC 1123, section 2.1, and underscores, which container networks use.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from deepspeed.utils.errors import DeepSpeedError

World = dict[str, list[int]]
"""Host -> ids of its devices in use, in rank order."""

MAX_SLOTS = 4096
_LINE = re.compile(r"(\S+)\s+slots=([0-9]+)")
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,251}[A-Za-z0-9_])?")


def is_host(text: str) -> bool:
    """Whether this is a host name or an IP address."""
    if _HOST.fullmatch(text):
        return True
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return "%" not in text  # a zone is anything at all


def read_hostfile(path: Path) -> dict[str, int]:
    """The pool {host: slots} of a hostfile. Raises DeepSpeedError, naming file and line, for what is no hostfile."""
    try:
        return parse_hostfile(path.read_text(encoding="utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise DeepSpeedError(f"hostfile {path} cannot be read: {error}.") from None


def parse_hostfile(text: str, name: str) -> dict[str, int]:
    """The pool {host: slots} of a hostfile's text."""
    pool: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, text.split("\n")), start=1):
        if not line or line.startswith("#"):
            continue
        match = _LINE.match(line)
        if match is None:
            raise DeepSpeedError(f'{name}, line {number}: {line!r} is not a host.\n  Write "<host> slots=<number>".')
        host, slots = match.groups()
        if not is_host(host):
            raise DeepSpeedError(
                f"{name}, line {number}: {host!r} is no host name and no IP address.\n"
                "  Names have letters, digits, dots, hyphens and underscores. A user or a port goes into ~/.ssh/config."
            )
        if len(slots) > 6 or int(slots) > MAX_SLOTS:
            raise DeepSpeedError(f"{name}, line {number}: slots={slots} is more than {MAX_SLOTS}.\n  Count devices.")
        if host in pool:
            raise DeepSpeedError(f"{name}, line {number}: host {host} is listed twice.\n  Remove one of the lines.")
        pool[host] = int(slots)
    if not any(pool.values()):
        what = "gives no host a slot" if pool else "lists no host"
        raise DeepSpeedError(f'{name} {what}.\n  Write a line "<host> slots=<number>" for each machine.')
    return pool


def select(pool: Mapping[str, int], include: str = "", exclude: str = "") -> World:
    """The slots that are left of a pool after --include or --exclude, of which only one may be given.

    Raises DeepSpeedError for a host or slot that the pool does not have, and when nothing is left.
    """
    if include and exclude:
        raise DeepSpeedError(
            f"--include {include!r} and --exclude {exclude!r} exclude each other.\n  Give one of them."
        )
    everything = {host: list(range(slots)) for host, slots in pool.items()}
    if include:
        named = _parse_filter(include, "--include", everything)
        left = {host: named[host] for host in everything if host in named}
    else:
        named = _parse_filter(exclude, "--exclude", everything)
        left = {host: [s for s in slots if s not in named.get(host, [])] for host, slots in everything.items()}
    left = {host: slots for host, slots in left.items() if slots}
    if not left:
        flag, text = ("--include", include) if include else ("--exclude", exclude)
        raise DeepSpeedError(f"{flag} {text!r} leaves no slot of {_pool_text(everything)}.\n  Leave at least one.")
    return left


def _parse_filter(text: str, flag: str, pool: World) -> World:
    """The slots a filter names, by host. A host without slots means all of them, unless it also comes with slots."""
    named: dict[str, set[int]] = {}
    for node in text.split("@") if text else ():
        host, colon, slots = node.strip().partition(":")
        if host not in pool:
            raise DeepSpeedError(f"{flag} {text!r}: no host {host!r}.\n  There are {', '.join(pool)}.")
        chosen = named.setdefault(host, set())
        for slot in slots.split(",") if colon else ():
            if not slot.strip().isdecimal():
                raise DeepSpeedError(
                    f"{flag} {text!r}: {slot!r} is not a slot number.\n"
                    f'  List slots one by one: "{host}:0,2". Ranges are not supported.'
                )
            if int(slot) not in pool[host]:
                raise DeepSpeedError(f"{flag} {text!r}: {host} has no slot {slot}.\n  It has {_pool_text(pool, host)}.")
            chosen.add(int(slot))
    return {host: sorted(slots) if slots else list(pool[host]) for host, slots in named.items()}


def _pool_text(pool: World, *hosts: str) -> str:
    return ", ".join(f"{host}:{','.join(map(str, pool[host])) or '-'}" for host in hosts or pool)


def first(world: World, num_nodes: int = -1, num_slots: int = -1) -> World:
    """The first hosts, each with slots 0..num_slots-1; -1 leaves what there is. More slots than a host has are kept."""
    if num_nodes > len(world):
        raise DeepSpeedError(f"--num_nodes {num_nodes}: there are {len(world)} hosts ({', '.join(world)}).")
    hosts = list(world)[:num_nodes] if num_nodes > 0 else list(world)
    return {host: list(range(num_slots)) if num_slots > 0 else world[host] for host in hosts}


def encode_world(world: Mapping[str, Sequence[int]]) -> str:
    """World info as it travels on command lines."""
    return base64.urlsafe_b64encode(json.dumps(world).encode()).decode()


def decode_world(text: str) -> World:
    """The world that `encode_world` wrote."""
    try:
        world = json.loads(base64.urlsafe_b64decode(text))
        if not world or not all(isinstance(slots, list) and slots for slots in world.values()):
            raise ValueError("a host without slots")
        return {str(host): [int(slot) for slot in slots] for host, slots in world.items()}
    except (binascii.Error, ValueError, AttributeError, TypeError):
        raise DeepSpeedError(
            f"--world_info={text!r} is not a world.\n"
            '  It is JSON {"host": [slot, ...]} in URL-safe base64; the `deepspeed` command writes it.'
        ) from None


def fetch_hostfile(hostfile_path: str | Path) -> dict[str, int] | None:
    """For scripts: the pool of a hostfile; None where there is no such file."""
    return read_hostfile(Path(hostfile_path)) if Path(hostfile_path).is_file() else None


def parse_inclusion_exclusion(resource_pool: Mapping[str, int], inclusion: str, exclusion: str) -> World:
    """For scripts: the slots of a pool that --include or --exclude leaves."""
    return select(resource_pool, inclusion or "", exclusion or "")
