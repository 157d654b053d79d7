"""A list of actions from measured times and a memory limit, for stages of any cost: `generate`.

A pipeline's best schedule depends on what its stages take. This lets every rank, whenever it is free, do the best that
it can do then, on a simulated clock, under several rules; takes the named schedules that fit beside them; and keeps the
list that ends first. So it is never worse than the best named one. A search is given up where it has stood still for longer than the
best list found so far allows. After the automatic schedule of arXiv:2401.10241
(section 3.1), with memory in bytes and hops that differ by rank left to the simulation.

What a free rank does: an input gradient that can begin now (others wait for it); else a forward that can begin now and
has room; else a weight gradient, unless something others wait for arrives within `patience` of its time.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from deepspeed.parallel.pipeline import schedules
from deepspeed.parallel.pipeline.actions import Action, Actions, Op, looped, v_shaped
from deepspeed.parallel.pipeline.check import Costs, makespan, peak_alive
from deepspeed.utils.errors import DeepSpeedError


class Rule(NamedTuple):
    """One way to choose."""

    patience: float
    """Shares of a weight gradient's time that a rank waits for something better."""
    splits: bool
    """Whether weight gradients are actions of their own."""


NEAR = 1.001
"""Where a named list ends within this of what no list can beat, no search is made."""

MANY = 50_000
"""Actions from which on only the rules that win most are tried: a search takes about 12 us per action."""

RULES = (Rule(0.0, True), Rule(0.0, False), Rule(0.5, True), Rule(1.0, True))


def generate(rank_of: Sequence[int], num_micro: int, costs: Costs, max_alive: Sequence[float] | None = None) -> Actions:
    """The best list found for stages on ranks `rank_of`; `max_alive` by rank, in the unit of `costs.activation`.

    Raises DeepSpeedError where a rank has no room for one micro-batch at each of its stages.
    """
    rank_of = tuple(rank_of)
    num_ranks = max(rank_of) + 1
    limits = list(max_alive) if max_alive is not None else [float("inf")] * num_ranks
    for rank, limit in enumerate(limits):
        least = sum(costs.alive(stage) for stage, owner in enumerate(rank_of) if owner == rank)
        if least > limit:
            raise DeepSpeedError(
                f"pipeline rank {rank} may keep {limit:g} alive, one micro-batch at each of its stages takes {least:g}.\n"
                "  Use smaller micro-batches, activation checkpointing, or more stages."
            )
    bound = least_makespan(rank_of, num_micro, costs)
    best: tuple[float, Actions] | None = None
    for is_search, candidates in (
        (False, _named(rank_of, num_ranks, num_micro)),
        (True, _searches(rank_of, num_ranks, num_micro, costs, limits)),
    ):
        for made in candidates:
            candidate = made.run(best[0] if best is not None else float("inf")) if isinstance(made, _Search) else made
            if candidate is None:
                continue
            fits = all(alive <= limit for alive, limit in zip(peak_alive(candidate, costs), limits, strict=True))
            ends = makespan(candidate, costs) if fits else float("inf")
            if fits and (best is None or ends < best[0]):
                best = ends, candidate
            if is_search and best is not None and best[0] <= NEAR * bound:
                return best[1]
        if best is not None and best[0] <= NEAR * bound:
            break
    assert best is not None, "a search keeps to the limits, and there is room for one micro-batch"
    return best[1]


def least_makespan(rank_of: Sequence[int], num_micro: int, costs: Costs) -> float:
    """No list ends earlier: a rank can begin when the first micro-batch reaches it, has all its work to do, and its last
    gradient has the way back before it."""
    least = 0.0
    for rank in set(rank_of):
        stages = [stage for stage, owner in enumerate(rank_of) if owner == rank]
        busy = num_micro * sum(costs.forward[s] + costs.input[s] + costs.weight[s] for s in stages)
        before = range(stages[0])
        hops = sum(costs.hop for s in before if rank_of[s] != rank_of[s + 1])
        there = sum(costs.forward[s] for s in before) + hops
        back = sum(costs.input[s] for s in before) + hops
        least = max(least, there + busy + max(0.0, back - num_micro * sum(costs.weight[s] for s in stages)))
    return least


def _named(rank_of: tuple[int, ...], num_ranks: int, num_micro: int) -> Iterable[Actions]:
    """The named schedules for this placement."""
    for make in schedules.NAMED.values():
        chunks = len(rank_of) // num_ranks
        takes_chunks = make in (schedules.interleaved, schedules.zb_h1) and rank_of == looped(num_ranks, len(rank_of))
        if not takes_chunks and chunks != (2 if rank_of == v_shaped(num_ranks) else 1):
            continue
        try:
            made = make(num_ranks, num_micro, chunks) if takes_chunks else make(num_ranks, num_micro)
        except DeepSpeedError:  # numbers of micro-batches that this schedule does not take
            continue
        if made.rank_of == rank_of:
            yield made


def _searches(
    rank_of: tuple[int, ...], num_ranks: int, num_micro: int, costs: Costs, limits: Sequence[float]
) -> Iterable[_Search]:
    """One under each rule, with what is allowed and with just enough to keep the pipeline full."""
    ahead = [
        2.0 * sum(costs.alive(s) for s in range(len(rank_of)) if rank_of[s] == rank) * num_ranks
        for rank in range(num_ranks)
    ]
    rooms = dict.fromkeys([tuple(map(min, limits, ahead)), tuple(limits)])
    is_large = 3 * len(rank_of) * num_micro > MANY
    for rule in RULES[:2] if is_large else RULES:
        for room in list(rooms)[:1] if is_large else rooms:
            yield _Search(rank_of, num_micro, costs, room, rule)


class _Search:
    """Ranks on a clock, each choosing by one rule."""

    def __init__(
        self, rank_of: tuple[int, ...], num_micro: int, costs: Costs, room: Sequence[float], rule: Rule
    ) -> None:
        self._rank_of, self._num_micro, self._costs, self._rule = rank_of, num_micro, costs, rule
        self._room = list(room)
        self._stages = [[s for s, owner in enumerate(rank_of) if owner == rank] for rank in range(len(room))]
        last = len(rank_of)
        # When the input of the next forward and the gradient of the next backward of a stage are there, in order.
        self._inputs = [deque([0.0] * num_micro) if stage == 0 else deque() for stage in range(last)]
        self._gradients: list[deque[float]] = [deque() for _ in range(last)]
        self._next = [[0, 0] for _ in range(last)]
        self._owed: list[deque[Action]] = [deque() for _ in room]
        self._lists: list[list[Action]] = [[] for _ in room]
        self._alive = [0.0] * len(room)
        self._sizes = [costs.alive(stage) for stage in range(last)]
        # Of each stage, the later ones of its rank.
        self._later = [[s for s in range(stage + 1, last) if rank_of[s] == rank_of[stage]] for stage in range(last)]

    def run(self, best: float = float("inf")) -> Actions | None:
        """The lists of all ranks; None as soon as a rank has stood still for so long that they end later than `best`."""
        of_micro = [sum(f + i + w for f, i, w in self._triples(rank)) for rank in range(len(self._room))]
        spare = [best - self._num_micro * work for work in of_micro]
        events = [(0.0, rank) for rank in range(len(self._room))]
        scheduled = dict.fromkeys(range(len(self._room)), 0.0)
        free = [0.0] * len(self._room)
        while events:
            now, rank = heapq.heappop(events)
            if scheduled.get(rank) != now:
                continue
            del scheduled[rank]
            action, wake = self._choose(rank, now)
            if action is not None:
                spare[rank] -= now - free[rank]
                if spare[rank] < 0.0:
                    return None
                free[rank] = wake = now + self._costs.of(action)
                woken = self._take(rank, action, wake)
                for other, at in woken:
                    self._schedule(events, scheduled, other, max(at, free[other]))
            if wake is not None:
                self._schedule(events, scheduled, rank, wake)
        name = f"generated ({'split' if self._rule.splits else 'whole'} backward)"
        return Actions(tuple(map(tuple, self._lists)), self._rank_of, self._num_micro, name)

    def _triples(self, rank: int) -> Iterable[tuple[float, float, float]]:
        costs = self._costs
        return ((costs.forward[s], costs.input[s], costs.weight[s]) for s in self._stages[rank])

    @staticmethod
    def _schedule(events: list[tuple[float, int]], scheduled: dict[int, float], rank: int, at: float) -> None:
        if scheduled.get(rank, float("inf")) > at:
            scheduled[rank] = at
            heapq.heappush(events, (at, rank))

    def _choose(self, rank: int, now: float) -> tuple[Action | None, float | None]:
        """What a free rank does now; or nothing, and when something that is on its way arrives."""
        soon: float | None = None
        for stage in reversed(self._stages[rank]):
            at = self._gradients[stage][0] if self._gradients[stage] else None
            if at is not None and at <= now:
                return Action(stage, Op.INPUT if self._rule.splits else Op.BACKWARD, self._next[stage][1]), None
            soon = _earlier(soon, at)
        for stage in reversed(self._stages[rank]):
            if not self._inputs[stage] or not self._has_room(rank, stage):
                continue
            at = self._inputs[stage][0]
            if at <= now:
                return Action(stage, Op.FORWARD, self._next[stage][0]), None
            soon = _earlier(soon, at)
        if self._owed[rank]:
            weight = self._owed[rank][0]
            if soon is None or soon - now > self._rule.patience * self._costs.of(weight):
                return weight, None
        return None, soon

    def _has_room(self, rank: int, stage: int) -> bool:
        """Whether a forward fits; an earlier stage leaves room for the later ones, or nothing would ever end."""
        next_one = self._next[stage][0]
        needed = self._alive[rank] + self._sizes[stage]
        for later in self._later[stage]:
            if self._next[later][0] <= next_one:
                needed += self._sizes[later]
        return needed <= self._room[rank]

    def _take(self, rank: int, action: Action, end: float) -> list[tuple[int, float]]:
        """Note an action; (rank, time) of those who get something from it."""
        self._lists[rank].append(action)
        stage, op, micro = action
        if op is Op.WEIGHT:
            self._owed[rank].popleft()
            self._alive[rank] -= self._sizes[stage]
            return []
        if op is Op.FORWARD:
            self._inputs[stage].popleft()
            self._next[stage][0] += 1
            self._alive[rank] += self._sizes[stage]
            if stage == len(self._rank_of) - 1:
                self._gradients[stage].append(end)
                return []
            return [self._arrive(rank, self._inputs, stage + 1, end)]
        self._gradients[stage].popleft()
        self._next[stage][1] += 1
        if op is Op.INPUT:
            self._owed[rank].append(Action(stage, Op.WEIGHT, micro))
        else:
            self._alive[rank] -= self._sizes[stage]
        return [self._arrive(rank, self._gradients, stage - 1, end)] if stage > 0 else []

    def _arrive(self, rank: int, queues: list[deque[float]], stage: int, end: float) -> tuple[int, float]:
        owner = self._rank_of[stage]
        at = end + (self._costs.hop if owner != rank else 0.0)
        queues[stage].append(at)
        return owner, at


def _earlier(one: float | None, other: float | None) -> float | None:
    return min((at for at in (one, other) if at is not None), default=None)
