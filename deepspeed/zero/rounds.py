"""In which order buckets leave the rank, pure: what is full leaves when all before it have left, each once per round.

Asked by the reducer about gradients, and by `memory.replay` about their sizes. All ranks launch the same order, whichever order
their own gradients come in; so a bucket that is full waits for its turn.

    order    a b c d        full: b      full: a         full: d     end of the round
    due                     -            a b             -           c d

Invariant: within a round every member is due exactly once, in `order`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar, final

T = TypeVar("T")


@final
class Rounds(Generic[T]):
    """The rounds of some members, in an order that may be learnt."""

    def __init__(self) -> None:
        self.members: list[T] = []
        """In the order in which they were added."""
        self.order: list[T] = []
        self._position: dict[T, int] = {}
        self._next = 0
        self._full: set[T] = set()
        self._filled: dict[T, None] = {}

    def add(self, members: Sequence[T]) -> None:
        """Have these too, after those that are here."""
        self.members += members
        self._set([*self.order, *members])

    def _set(self, order: list[T]) -> None:
        self.order = order
        self._position = {member: i for i, member in enumerate(order)}

    @property
    def has_begun(self) -> bool:
        """Whether a member is full, or was due, in this round."""
        return self._next > 0 or bool(self._full)

    def had_turn(self, member: T) -> bool:
        """Whether a member was full, or was due, in this round: what comes now belongs to the next."""
        return member in self._full or self._position[member] < self._next

    def fill(self, member: T) -> None:
        """A member is full."""
        self._full.add(member)
        self._filled[member] = None

    def due(self) -> Iterator[T]:
        """The members whose turn it is."""
        while self._next < len(self.order) and self.order[self._next] in self._full:
            yield self._advance()

    def rest(self) -> Iterator[T]:
        """The members whose turn has not come, full or not."""
        while self._next < len(self.order):
            yield self._advance()

    def _advance(self) -> T:
        self._next += 1
        return self.order[self._next - 1]

    def end(self) -> None:
        """Begin a round anew."""
        self._next = 0
        self._full.clear()

    def completion_order(self) -> list[int]:
        """Numbers of the members in the order in which they filled since the last call; those that did not, last."""
        seen = [self.members.index(member) for member in self._filled]
        self._filled.clear()
        return seen + [i for i in range(len(self.members)) if i not in seen]

    def set_order(self, numbers: Sequence[int]) -> None:
        """Have this order from the next round on."""
        assert sorted(numbers) == list(range(len(self.members))), f"not an order of all members: {numbers}"
        self._set([self.members[i] for i in numbers])
