"""Who sends what to whom, in which order, as the list of actions has it. Pure; used by `mail`.

Both sides of a hop know the whole list, so no message needs a name, and one that arrives says how far its sender had come: what it had
to take of the receiver's messages before is known to have left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from deepspeed.parallel.pipeline.actions import Actions, Op


class Key(NamedTuple):
    """A message: what stage `to` gets for a micro-batch, from the stage before (`is_forward`) or after."""

    to: int
    micro: int
    is_forward: bool


class Way(NamedTuple):
    """Messages between this rank and another pipeline rank, of activations (`is_forward`) or of gradients."""

    peer: int
    is_forward: bool


@dataclass(frozen=True)
class Routes:
    """One rank's messages of a list."""

    due: Mapping[Way, tuple[Key, ...]]
    """What others send here, in their order."""
    to_send: Mapping[Way, tuple[Key, ...]]
    """What this rank sends, in its order."""
    taken_before: Mapping[Key, tuple[int, int]]
    """By message that is due: how many of this rank's gradients and activations its sender has taken before it sends."""


def routes_of(actions: Actions, own: int) -> Routes:
    """The messages of pipeline rank `own`."""
    rank_of, last = actions.rank_of, actions.num_stages - 1
    due: dict[Way, list[Key]] = {}
    to_send: dict[Way, list[Key]] = {}
    taken_before: dict[Key, tuple[int, int]] = {}
    beside = {rank_of[s + step] for s in actions.stages_of(own) for step in (-1, 1) if 0 <= s + step <= last}
    for sender in sorted(beside | {own}):
        taken = [0, 0]
        for stage, op, micro in actions.lists[sender]:
            if op is Op.WEIGHT:
                continue
            is_forward = op is Op.FORWARD
            source, to = (stage - 1, stage + 1) if is_forward else (stage + 1, stage - 1)
            taken[is_forward] += sender != own and 0 <= source <= last and rank_of[source] == own
            if not 0 <= to <= last or rank_of[to] == sender:
                continue
            key = Key(to, micro, is_forward)
            if sender == own:
                to_send.setdefault(Way(rank_of[to], is_forward), []).append(key)
            elif rank_of[to] == own:
                due.setdefault(Way(sender, is_forward), []).append(key)
                taken_before[key] = taken[0], taken[1]
    return Routes(
        {way: tuple(keys) for way, keys in due.items()},
        {way: tuple(keys) for way, keys in to_send.items()},
        taken_before,
    )
