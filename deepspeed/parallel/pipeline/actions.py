"""What a pipeline does, as a list of actions per rank that can be printed, read from CSV, checked and drawn.

Made by `schedules`, `generate` or a user's file; checked and timed by `check`; carried out by the executor. Pure: knows
no tensor and no process.

    0F3     forward of micro-batch 3 through stage 0
    0B3     its whole backward
    0I3     its backward as far as the stage's inputs, which is all that the stage before waits for
    0W3     the weight gradients that `0I3` left

Sends and receives are not written: they follow from who has a stage. A row of the CSV is a rank, a cell an action or
nothing; that is also the form of torch.distributed.pipelining, whose files can be read.

Invariant: `Actions` are well formed only; `check.require_valid` says whether they are complete and can be carried out.
"""

from __future__ import annotations

import csv
import enum
import io
import re
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from deepspeed.utils.errors import DeepSpeedError


class Op(enum.Enum):
    """What is done with one micro-batch at one stage; the value is the letter that is printed."""

    FORWARD = "F"
    BACKWARD = "B"
    INPUT = "I"
    WEIGHT = "W"

    __hash__ = object.__hash__  # enum's own is written in Python; long lists hash ops a million times


class Action(NamedTuple):
    """One op on one micro-batch at one stage."""

    stage: int
    op: Op
    micro: int

    def __str__(self) -> str:
        return f"{self.stage}{self.op.value}{self.micro}"


_TEXT = re.compile(r"(\d+)([FBIW])(\d+)")


def parse_action(text: str) -> Action:
    """The inverse of `str`. Raises DeepSpeedError for anything else."""
    match = _TEXT.fullmatch(text.strip())
    if match is None:
        raise DeepSpeedError(
            f"{text!r} is not a pipeline action.\n  Write <stage><F, B, I or W><micro-batch>, as 0F3, or leave the cell empty."
        )
    return Action(int(match[1]), Op(match[2]), int(match[3]))


@dataclass(frozen=True)
class Actions:
    """The lists of all ranks, and which rank has which stage."""

    lists: tuple[tuple[Action, ...], ...]
    rank_of: tuple[int, ...]
    """By stage."""
    num_micro: int
    name: str = ""

    @property
    def num_ranks(self) -> int:
        """Pipeline ranks."""
        return len(self.lists)

    @property
    def num_stages(self) -> int:
        """Stages; several per rank where a schedule interleaves."""
        return len(self.rank_of)

    def stages_of(self, rank: int) -> list[int]:
        """The stages that a rank has, in the order of the model."""
        return [stage for stage, owner in enumerate(self.rank_of) if owner == rank]

    def __str__(self) -> str:
        """A line per rank."""
        return "\n".join(f"rank {rank}: {' '.join(map(str, row))}" for rank, row in enumerate(self.lists))

    def to_csv(self) -> str:
        """A row per rank."""
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([str(action) for action in row] for row in self.lists)
        return out.getvalue()


def looped(num_ranks: int, num_stages: int) -> tuple[int, ...]:
    """Stage s on rank s modulo ranks: one chunk after another, from the first rank to the last."""
    return tuple(stage % num_ranks for stage in range(num_stages))


def v_shaped(num_ranks: int) -> tuple[int, ...]:
    """Rank r has stages r and 2 * ranks - 1 - r: the first rank has the first and the last."""
    return (*range(num_ranks), *reversed(range(num_ranks)))


def in_halves(actions: Actions) -> Actions:
    """The same list with every backward as its two halves, one after the other."""
    lists = (
        tuple(
            Action(action.stage, op, action.micro)
            for action in row
            for op in ((Op.INPUT, Op.WEIGHT) if action.op is Op.BACKWARD else (action.op,))
        )
        for row in actions.lists
    )
    return Actions(tuple(lists), actions.rank_of, actions.num_micro, f"{actions.name} in halves")


def read_csv(text: str, name: str = "") -> Actions:
    """Lists from CSV; which rank has which stage is seen in them. Raises DeepSpeedError, naming row and cell."""
    rows: list[tuple[Action, ...]] = []
    rank_of: dict[int, int] = {}
    for rank, row in enumerate(csv.reader(io.StringIO(text))):
        actions = []
        for column, cell in enumerate(row):
            if not cell.strip():
                continue
            try:
                action = parse_action(cell)
            except DeepSpeedError as error:
                raise DeepSpeedError(f"rank {rank}, cell {column + 1}: {error}") from None
            if rank_of.setdefault(action.stage, rank) != rank:
                raise DeepSpeedError(
                    f"rank {rank}, cell {column + 1}: {action} is on rank {rank}, but rank {rank_of[action.stage]} has stage {action.stage} already."
                )
            actions.append(action)
        rows.append(tuple(actions))
    missing = sorted(set(range(max(rank_of, default=-1) + 1)) - rank_of.keys())
    if missing or not rank_of:
        raise DeepSpeedError(f"no rank has stage {missing[0]}." if missing else "the list of actions is empty.")
    num_micro = 1 + max(action.micro for row in rows for action in row)
    return Actions(tuple(rows), tuple(rank_of[stage] for stage in sorted(rank_of)), num_micro, name)


class Script:
    """Writes one rank's list from phrases: `say("F0 B1", 3)` is three forwards of chunk 0 with a backward of chunk 1 each.

    A word is an op and the rank's chunk (its k-th stage); micro-batches count up by themselves. `W` is the oldest weight
    gradient that is owed, `W1` the oldest of chunk 1. Where `forwards` and `backwards` are given they tell the chunks, and words are ops alone.
    With `weight_lag`, a weight gradient follows each `I` as soon as more than that many are owed.
    """

    def __init__(
        self,
        stages: Sequence[int],
        num_micro: int,
        *,
        forwards: Iterable[int] = (),
        backwards: Iterable[int] = (),
        weight_lag: int | None = None,
    ) -> None:
        self._stages = stages
        self._num_micro = num_micro
        self._forwards, self._backwards = iter(forwards), iter(backwards)
        self._num_forwards, self._num_backwards = dict.fromkeys(stages, 0), dict.fromkeys(stages, 0)
        self._owed: deque[tuple[int, int]] = deque()
        self._weight_lag = weight_lag
        self.actions: list[Action] = []

    def say(self, phrase: str, times: int = 1) -> Script:
        """Append a phrase so many times (none if negative); words beyond the last micro-batch are left out."""
        words = [(Op(word[0]), int(word[1:]) if word[1:] else None) for word in phrase.split()]
        for _ in range(times):
            for op, chunk in words:
                if op is Op.WEIGHT:
                    self._weight(chunk)
                else:
                    self._pass(op, chunk)
        return self

    def complete(self) -> tuple[Action, ...]:
        """Append the weight gradients that are still owed; the whole list."""
        while self._owed:
            self._weight(None)
        return tuple(self.actions)

    def _weight(self, chunk: int | None) -> None:
        owed = self._owed
        if chunk is None:
            found = owed.popleft() if owed else None
        else:
            found = next((o for o in owed if o[0] == self._stages[chunk]), None)
            if found is not None:
                owed.remove(found)
        if found is not None:
            self.actions.append(Action(found[0], Op.WEIGHT, found[1]))

    def _pass(self, op: Op, chunk: int | None) -> None:
        is_forward = op is Op.FORWARD
        if chunk is None:
            chunk = next(self._forwards if is_forward else self._backwards)
        stage, counted = self._stages[chunk], self._num_forwards if is_forward else self._num_backwards
        micro = counted[stage]
        counted[stage] = micro + 1
        if micro >= self._num_micro:
            return
        self.actions.append(Action(stage, op, micro))
        if op is Op.INPUT:
            self._owed.append((stage, micro))
            if self._weight_lag is not None and len(self._owed) > self._weight_lag:
                self._weight(None)
