"""What ranks that share a sequence send for one attention and for one forward, by operation. Pure.

Read by predictions, which have no other ranks: `memory.parts` where it traces a rank's part, the planner where it divides a traced whole.
Who has which heads and chunks is asked of those that the attention itself asks (`heads`, `ring`).

Invariant: equal to what `comm.recorder` counts in a run (`tests/planner/test_counts.py`).
"""

from __future__ import annotations

from typing import NamedTuple

from deepspeed.parallel.sequence.heads import Heads, share_heads
from deepspeed.parallel.sequence.ring import plan_ring

ALL_TO_ALL, RING, INPUTS = "sequence.all_to_all", "sequence.ring", "sequence.inputs"
_HEADER = 6
"""Integers in which ranks tell each other what they have (`inputs`)."""
_WIDE = 4
"""Bytes of an element of gradients of keys that go round."""


class Attends(NamedTuple):
    """One attention as a rank calls it: heads of its queries and keys, tokens, widths of a key and of a value, bytes of an element."""

    samples: int
    num_query: int
    num_key: int
    tokens: int
    key_width: int
    value_width: int
    itemsize: int


Sent = list[tuple[str, int]]


def of_attention(at: Attends, num_ranks: int, *, can_ring: bool = True, rank: int = 0) -> tuple[Sent, Sent]:
    """(forward, backward) messages of rank `rank`. `at`: before the exchange, of this rank's tokens, of which all ranks have as many."""
    whole = at.tokens * num_ranks
    rings = at.num_key < num_ranks and can_ring
    if rings:
        plan = plan_ring(at.num_query, at.num_key, whole, num_ranks, rank)
        heads, ways = plan.heads, plan.num_heads_ranks
        own_tokens = sum(end - start for start, end in plan.chunks[rank])
    else:
        heads, ways, own_tokens = share_heads(at.num_query, at.num_key, num_ranks), num_ranks, whole
    each = at.samples * at.itemsize
    query, key = (_lengths(ranges)[:ways] for ranges in (heads.query, heads.key))
    widths = at.key_width + at.value_width
    there = each * at.tokens * (sum(query) * at.key_width + sum(key) * widths)
    back = each * own_tokens * query[rank % ways] * at.value_width
    forward = [(ALL_TO_ALL, there), *_round(at, heads, num_ranks, rank, rings), (ALL_TO_ALL, back)]
    grads_there = each * at.tokens * sum(query) * at.value_width
    grads_back = each * own_tokens * (query[rank % ways] * at.key_width + key[rank % ways] * widths)
    backward = [(ALL_TO_ALL, grads_there), *_round(at, heads, num_ranks, rank, rings, True), (ALL_TO_ALL, grads_back)]
    return forward, backward


def _lengths(ranges: tuple[tuple[int, int], ...]) -> list[int]:
    return [end - start for start, end in ranges]


def _round(at: Attends, heads: Heads, num_ranks: int, rank: int, rings: bool, backward: bool = False) -> Sent:
    """Keys and values on their way round; in backward with their gradients, which go home."""
    if not rings:
        return []
    plan = plan_ring(at.num_query, at.num_key, at.tokens * num_ranks, num_ranks, rank)
    reads = heads.expand(rank)
    num_key = _lengths(heads.key)[rank] if reads is None else len(reads)
    elements = [
        at.samples * num_key * (at.key_width + at.value_width) * plan.length_at(i) for i in range(plan.num_steps)
    ]
    sent = [(RING, at.itemsize * each) for each in elements[:-1]]
    if backward and plan.num_steps > 1:
        sent += [(RING, _WIDE * each) for each in elements]
    return sent


def of_inputs(samples: int, tokens: int, num_ranks: int, rows: int) -> Sent:
    """Of one forward. rows: of position ids, of a padding mask, of targets that are given with it."""
    return [(INPUTS, 8 * _HEADER * num_ranks), (INPUTS, 8 * rows * samples * tokens * num_ranks)]
