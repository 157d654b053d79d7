"""Whether a list of actions can be carried out, how long it takes, who waits, and what is alive: a pure simulation.

Called before a list is run (`require_valid`), by the generator, and by tests and reports that compare a real run with
its plan. Sends do not block: what a stage has made is on its way at once and arrives a hop later. Each rank does its
list in order, each action as soon as what it needs has arrived:

    forward    the stage before's forward of the micro-batch
    backward   the own forward, and the stage after's backward (or input gradient) of the micro-batch
    weight     the own input gradient

Invariant: `simulate` ends for every list. It raises exactly where a rank would wait for ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from deepspeed.parallel.pipeline.actions import Action, Actions, Op
from deepspeed.utils.errors import DeepSpeedError


@dataclass(frozen=True)
class Costs:
    """Seconds (or any unit) per stage and op, of a hop between ranks, and what a live micro-batch takes at each stage."""

    forward: Sequence[float]
    input: Sequence[float]
    weight: Sequence[float]
    hop: float = 0.0
    activation: Sequence[float] = ()
    """Bytes (or any unit) from a forward to the end of its backward; default 1 at every stage."""

    @classmethod
    def equal(
        cls, num_stages: int, forward: float = 1.0, input: float = 1.0, weight: float = 1.0, hop: float = 0.0
    ) -> Costs:
        """The same at every stage."""
        return cls([forward] * num_stages, [input] * num_stages, [weight] * num_stages, hop)

    def of(self, action: Action) -> float:
        """How long an action takes."""
        stage = action.stage
        if action.op is Op.FORWARD:
            return self.forward[stage]
        if action.op is Op.INPUT:
            return self.input[stage]
        return self.weight[stage] if action.op is Op.WEIGHT else self.input[stage] + self.weight[stage]

    def alive(self, stage: int) -> float:
        """What one micro-batch takes at a stage."""
        return self.activation[stage] if self.activation else 1.0


class Span(NamedTuple):
    """An action with its time."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What a simulation found: the spans of each rank, in order."""

    spans: tuple[tuple[Span, ...], ...]

    @property
    def makespan(self) -> float:
        """The end of the last action."""
        return max((row[-1].end for row in self.spans if row), default=0.0)

    def busy(self, rank: int) -> float:
        """Time that a rank computes."""
        return sum(span.end - span.start for span in self.spans[rank])

    @property
    def bubble(self) -> float:
        """The share of all ranks' time, from the first action of all to the last, in which they wait."""
        whole = self.makespan * len(self.spans)
        return 1 - sum(map(self.busy, range(len(self.spans)))) / whole if whole else 0.0

    def bubble_of(self, rank: int) -> float:
        """The share of a rank's own time, from its first action to its last, in which it waits."""
        row = self.spans[rank]
        whole = row[-1].end - row[0].start if row else 0.0
        return 1 - self.busy(rank) / whole if whole else 0.0


def require_valid(actions: Actions) -> None:
    """Raise DeepSpeedError, naming rank and action, unless each micro-batch passes each stage once, in an order in which
    no rank waits for ever. Lists without any backward are for evaluation and are valid too."""
    trains = any(action.op is not Op.FORWARD for row in actions.lists for action in row)
    for rank, row in enumerate(actions.lists):
        done: dict[tuple[int, int], str] = {}
        for action in row:
            _check_place(actions, rank, action)
            so_far = done.get((action.stage, action.micro), "")
            if action.op.value in so_far or not so_far.endswith(_NEEDS_BEFORE[action.op]):
                raise _invalid(rank, action, _why_not(action, so_far))
            done[action.stage, action.micro] = so_far + action.op.value
        for stage in actions.stages_of(rank):
            for micro in range(actions.num_micro):
                found = done.get((stage, micro), "")
                if found not in (("FB", "FIW") if trains else ("F",)):
                    missing = "forward" if not found else "weight gradient" if found == "FI" else "backward"
                    raise DeepSpeedError(
                        f"pipeline rank {rank}: stage {stage} has no {missing} of micro-batch {micro}."
                    )
    simulate(actions, Costs.equal(actions.num_stages))


_NEEDS_BEFORE = {Op.FORWARD: "", Op.BACKWARD: "F", Op.INPUT: "F", Op.WEIGHT: "I"}


def _why_not(action: Action, so_far: str) -> str:
    """`so_far`: the ops of the micro-batch at the stage before this one that is out of place."""
    before, needed = so_far[-1:], _NEEDS_BEFORE[action.op]
    if action.op.value in so_far:
        return "is there twice"
    if needed and needed not in so_far and before != "B":
        name = Action(action.stage, Op(needed), action.micro)
        return f"comes before {name}, or {name} is missing"
    return f"comes after {Action(action.stage, Op(before), action.micro)}: a backward is B alone, or I and later W"


def require_training(actions: Actions) -> None:
    """Raise DeepSpeedError for lists of forwards alone, which would train nothing."""
    if all(action.op is Op.FORWARD for row in actions.lists for action in row):
        raise DeepSpeedError(
            f"{actions.name or 'the list'} has forwards alone: nothing would be trained.\n"
            "  Write a backward (B, or I and W) of each micro-batch at each stage, or call eval_batch."
        )


def _check_place(actions: Actions, rank: int, action: Action) -> None:
    if not 0 <= action.stage < actions.num_stages or actions.rank_of[action.stage] != rank:
        raise _invalid(rank, action, "is of a stage that this rank does not have")
    if not 0 <= action.micro < actions.num_micro:
        raise _invalid(rank, action, f"is of a micro-batch beyond the {actions.num_micro} there are")


def _invalid(rank: int, action: Action, why: str) -> DeepSpeedError:
    return DeepSpeedError(f"pipeline rank {rank}: {action} {why}.")


def simulate(actions: Actions, costs: Costs) -> Timeline:
    """Carry the lists out on a clock. Raises DeepSpeedError, naming who waits for what, where they wait for ever."""
    arrived: dict[tuple[int, bool, int], float] = {}
    waiting: dict[tuple[int, bool, int], int] = {}
    spans: list[list[Span]] = [[] for _ in actions.lists]
    free = [0.0] * actions.num_ranks
    ready = deque(range(actions.num_ranks))
    while ready:
        rank = ready.popleft()
        row, at = actions.lists[rank], len(spans[rank])
        while at < len(row):
            action = row[at]
            start = free[rank]
            needed = _need(actions, action)
            if needed is not None:
                if needed not in arrived:
                    waiting[needed] = rank
                    break
                hop = costs.hop if actions.rank_of[needed[0]] != rank else 0.0
                start = max(start, arrived[needed] + hop)
            free[rank] = end = start + costs.of(action)
            spans[rank].append(Span(action, start, end))
            at += 1
            made = (action.stage, action.op is Op.FORWARD, action.micro)
            if action.op is not Op.WEIGHT:
                arrived[made] = end
                if made in waiting:
                    ready.append(waiting.pop(made))
    stuck = [rank for rank, row in enumerate(actions.lists) if len(spans[rank]) < len(row)]
    if stuck:
        raise DeepSpeedError(
            "the pipeline's ranks wait for each other for ever: "
            + "; ".join(_stuck(actions, rank, len(spans[rank])) for rank in stuck[:4])
            + "."
        )
    return Timeline(tuple(tuple(row) for row in spans))


def in_a_row(actions: Actions, num_batches: int) -> Actions:
    """So many batches as one list: a rank begins its next one when it has done this, whoever else has not."""
    lists = (
        tuple(
            Action(action.stage, action.op, action.micro + batch * actions.num_micro)
            for batch in range(num_batches)
            for action in row
        )
        for row in actions.lists
    )
    num_micro = actions.num_micro * num_batches
    return Actions(tuple(lists), actions.rank_of, num_micro, f"{num_batches} batches of {actions.name}")


def steady_bubble(actions: Actions, costs: Costs) -> float:
    """The share of the time in which ranks wait where batches follow each other without a barrier, as with `post_validation`.

    Zero Bubble Pipeline Parallelism (arXiv:2401.10241) means this by "bubble": a batch takes as long as the rank that is longest about it.
    """
    spans = simulate(in_a_row(actions, _SETTLED + 1), costs).spans
    per_batch = [len(row) for row in actions.lists]
    period = max(row[-1].end - row[-1 - num].end if num else 0.0 for row, num in zip(spans, per_batch, strict=True))
    one = simulate(actions, costs)
    busy = sum(map(one.busy, range(actions.num_ranks)))
    return 1 - busy / (period * actions.num_ranks) if period else 0.0


_SETTLED = 3
"""Batches after which each one takes as long as the one before."""


def makespan(actions: Actions, costs: Costs) -> float:
    """`simulate(actions, costs).makespan` for lists that are valid, in a third of the time: for searches over many lists."""
    num_micro, rank_of, last = actions.num_micro, actions.rank_of, actions.num_stages - 1
    durations = {
        Op.FORWARD: list(costs.forward), Op.INPUT: list(costs.input), Op.WEIGHT: list(costs.weight),
        Op.BACKWARD: [i + w for i, w in zip(costs.input, costs.weight, strict=True)],
    }  # fmt: skip
    there = [costs.hop if s and rank_of[s] != rank_of[s - 1] else 0.0 for s in range(last + 1)]
    back = [costs.hop if s < last and rank_of[s] != rank_of[s + 1] else 0.0 for s in range(last + 1)]
    # When the input, and the gradient, of (stage, micro-batch) are there; none for what nobody is waited for.
    inputs: list[float | None] = [0.0 if s == 0 else None for s in range(last + 1) for _ in range(num_micro)]
    gradients: list[float | None] = [0.0 if s == last else None for s in range(last + 1) for _ in range(num_micro)]
    at, free = [0] * actions.num_ranks, [0.0] * actions.num_ranks
    ready = deque(range(actions.num_ranks))
    waiting: dict[tuple[bool, int], int] = {}
    forward, weight = Op.FORWARD, Op.WEIGHT
    while ready:
        rank = ready.popleft()
        row, now = actions.lists[rank], free[rank]
        for i in range(at[rank], len(row)):
            stage, op, micro = row[i]
            place = stage * num_micro + micro
            if op is not weight:
                is_forward = op is forward
                arrived = (inputs if is_forward else gradients)[place]
                if arrived is None:
                    waiting[is_forward, place] = rank
                    at[rank] = i
                    break
                now = max(now, arrived) + durations[op][stage]
                if is_forward and stage < last:
                    inputs[place + num_micro] = now + there[stage + 1]
                    woken = waiting.pop((True, place + num_micro), None)
                elif not is_forward and stage > 0:
                    gradients[place - num_micro] = now + back[stage - 1]
                    woken = waiting.pop((False, place - num_micro), None)
                else:
                    continue
                if woken is not None:
                    ready.append(woken)
            else:
                now += durations[op][stage]
        else:
            at[rank] = len(row)
        free[rank] = now
    assert not waiting, "lists that are searched are valid"
    return max(free)


def _need(actions: Actions, action: Action) -> tuple[int, bool, int] | None:
    """(stage, is a forward, micro-batch) of the result of another stage that an action needs."""
    if action.op is Op.FORWARD:
        return (action.stage - 1, True, action.micro) if action.stage > 0 else None
    if action.op is Op.WEIGHT or action.stage == actions.num_stages - 1:
        return None
    return (action.stage + 1, False, action.micro)


def _stuck(actions: Actions, rank: int, at: int) -> str:
    action = actions.lists[rank][at]
    needed = _need(actions, action)
    assert needed is not None, "an action that needs nothing is never waited for"
    what = "forward" if needed[1] else "backward"
    return f"rank {rank} with {action} for the {what} of micro-batch {needed[2]} through stage {needed[0]}"


def peak_alive(actions: Actions, costs: Costs | None = None) -> list[float]:
    """Per rank, the most that is alive at once between forwards and the ends of their backwards: micro-batches, or with
    `costs` their sizes."""
    sizes = [costs.alive(stage) if costs else 1.0 for stage in range(actions.num_stages)]
    forward, input = Op.FORWARD, Op.INPUT
    peaks = []
    for row in actions.lists:
        now = peak = 0.0
        for stage, op, _ in row:
            if op is forward:
                now += sizes[stage]
                if now > peak:
                    peak = now
            elif op is not input:
                now -= sizes[stage]
        peaks.append(peak)
    return peaks
