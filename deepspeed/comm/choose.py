"""Which exchange a process group's buffers move by: the only place that decides."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from datetime import timedelta
from enum import Enum

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.constants import default_pg_timeout

from deepspeed.comm.collective import CollectiveExchange
from deepspeed.comm.counters import NUM_WORDS, host_words
from deepspeed.comm.direct import Circle, DirectExchange
from deepspeed.comm.exchange import Exchange, Ring
from deepspeed.comm.local import LocalExchange
from deepspeed.comm.shared import RING_NBYTES, Address, Board, SharedExchange
from deepspeed.comm.trial import NUMEL, Verdict, agreed, try_both, verdicts
from deepspeed.utils.errors import DeepSpeedError
from deepspeed.utils.logging import log_dist, warn_once

SHARED_MEMORY = "DS_SHARED_MEMORY"
"""The variable that says whether `comm.shared` is used; all ranks need the same."""
MAX_SHARED_RANKS = 16
"""Every rank reads every other's message: beyond so many, fewer and larger steps are better."""


class Sharing(Enum):
    """Whether small messages between CPU ranks of one host go through memory that they share, by the variable's word."""

    NEVER = "0"
    ALWAYS = "1"
    IF_FASTER = "auto"
    """Where a trial says so, when a process's first exchange of so many ranks is made. What holds without the variable."""


_worlds: weakref.WeakKeyDictionary[Board, ProcessGroup] = weakref.WeakKeyDictionary()
"""The default process group under which each board of this process was made."""


def make_exchange(
    group: ProcessGroup | None,
    device: torch.device,
    *,
    sharing: Sharing = Sharing.NEVER,
    until: ExitStack | None = None,
    is_watched: bool = False,
) -> Exchange:
    """The fastest exchange for buffers on `device`. None means all ranks, or this one where nothing is initialised.

    is_watched: its verbs are a training step's, and counted and recorded as such (`comm.exchange.verb`).

    Memory that it shares with other ranks is given back with `until`, or else when the exchange is collected, or when another is
    made after the default process group has ended. Collective where `sharing` is not NEVER.
    """
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return LocalExchange(None)
    group = group or dist.group.WORLD
    assert group is not None, "torch.distributed is initialised, so it has a default group"
    if group.size() == 1:
        return LocalExchange(group)
    made: DirectExchange | SharedExchange | CollectiveExchange
    if device.type != "cpu" or _backend_for(group, "cpu") != "gloo":
        made = CollectiveExchange(group)
    else:
        direct = DirectExchange(group)
        made = direct if sharing is Sharing.NEVER else _shared(direct, group, sharing, until=until) or direct
    made.is_watched = is_watched
    return made


def make_ring(group: ProcessGroup, *, sharing: Sharing = Sharing.NEVER) -> Ring:
    """The fastest way of few integers of every rank of a gloo group. Collective, also where ranks differ in `sharing`: they are told
    of that by what is made here."""
    shared = _shared(DirectExchange(group), group, sharing, RING_NBYTES)
    return Circle(group) if shared is None else shared.ring()


def waits_on_host(group: ProcessGroup | None, device: torch.device) -> bool:
    """Whether waiting for a collective of buffers on `device` keeps the host, rather than the device's stream alone."""
    if device.type == "cpu":
        return True
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return False
    group = group or dist.group.WORLD
    assert group is not None, "torch.distributed is initialised, so it has a default group"
    return _backend_for(group, device.type) in ("gloo", "mpi")


def sharing_of(environ: Mapping[str, str]) -> Sharing:
    """What the environment asks for. Raises DeepSpeedError for a word that is none of the switch's."""
    value = environ.get(SHARED_MEMORY, "") or Sharing.IF_FASTER.value
    if value not in [sharing.value for sharing in Sharing]:
        raise DeepSpeedError(
            f"{SHARED_MEMORY}={value} says nothing.\n"
            "  Set it to 1 for small messages through shared memory, to auto for that where a trial finds it faster, or to 0."
        )
    return Sharing(value)


def _shared(
    direct: DirectExchange,
    group: ProcessGroup,
    sharing: Sharing,
    room_nbytes: int | None = None,
    until: ExitStack | None = None,
) -> SharedExchange | None:
    """The exchange by shared memory; None where the ranks of a group have none, told once, or gloo is faster. Collective over them."""
    if group.size() > MAX_SHARED_RANKS:
        return None
    known = verdicts().get(group.size(), Verdict.NONE)
    found = {Sharing.NEVER: Verdict.GLOO, Sharing.ALWAYS: Verdict.SHARED, Sharing.IF_FASTER: known}[sharing]
    words, board, why = host_words(), None, "the compiled library is missing, or this is not Linux"
    give_back_ended()
    if words is not None and found is not Verdict.GLOO:
        try:
            board = Board(group.rank(), group.size(), dist.get_world_size(), room_nbytes)
        except OSError as error:
            why = f"no memory to share ({error})"
    mine = [0] * NUM_WORDS + [0, 0] if words is None or board is None else [*words, *board.address]
    everyone = _gathered(group, [*mine, found])
    all_found = {theirs.pop() for theirs in everyone}
    if Verdict.GLOO in all_found:
        return None
    if len({tuple(theirs[:NUM_WORDS]) for theirs in everyone}) > 1:
        why = why if board is None else "ranks are on several hosts, or some have no memory to share"
        board = None
    if board is not None:
        try:
            board.open([Address(*theirs[NUM_WORDS:]) for theirs in everyone])
        except OSError as error:
            why = f"the others' memory cannot be opened ({error})"
            board = None
    are_open = all(found for (found,) in _gathered(group, [int(board is not None)]))
    if board is None or not are_open:
        warn_once(f"small messages between CPU ranks go through gloo, not shared memory: {why}.")
        return None
    board.seal()
    world = dist.group.WORLD
    assert world is not None, "a group is made under a default group"
    _worlds[board] = world
    if until is not None:
        until.callback(board.close)
    shared = SharedExchange(direct, board, timeout_of(group).total_seconds())
    if Verdict.NONE in all_found and not _is_faster(shared, group):
        board.close()
        return None
    return shared


def give_back_ended() -> None:
    """Close the boards of groups that ended with their default process group."""
    world = dist.group.WORLD if dist.is_initialized() else None
    for board, theirs in list(_worlds.items()):
        if theirs is not world:
            board.close()


def _is_faster(shared: SharedExchange, group: ProcessGroup) -> bool:
    """Whether a trial says so, on all ranks; told, and kept for later groups of as many ranks."""
    # Another exchange, since what one receives into stays.
    times = agreed(_gathered(group, list(try_both(shared, DirectExchange(group)))))
    wins = times.first < times.second
    verdicts()[group.size()] = Verdict.SHARED if wins else Verdict.GLOO
    log_dist(
        f"small messages between {group.size()} CPU ranks go through {'shared memory' if wins else 'gloo'}: an all-reduce of "
        f"{4 * NUMEL >> 10} KiB took {times.first} us there, {times.second} us in gloo.",
        [0],
    )
    return wins


def _gathered(group: ProcessGroup, values: list[int]) -> list[list[int]]:
    mine = torch.tensor(values, dtype=torch.int64)
    found: list[Tensor] = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(found, mine, group=group)
    return [theirs.tolist() for theirs in found]


def timeout_of(group: ProcessGroup | None = None) -> timedelta:
    """What collectives of a group wait for each other; of the job's, if no group is given. torch makes a new group with half an
    hour, whatever the job was started with."""
    group = group or dist.group.WORLD
    assert group is not None
    for device in group._device_types:
        with suppress(RuntimeError, AttributeError):  # a backend written in Python, or without options
            return timedelta(seconds=group._get_backend(device).options._timeout.total_seconds())
    return default_pg_timeout


def _backend_for(group: ProcessGroup, device_type: str) -> str:
    config = dict(entry.split(":") for entry in str(dist.get_backend_config(group)).split(","))
    return config.get(device_type, "")
