"""When buckets leave the rank, pure: in which order (`Rounds`), and how many at once (`InFlight`).

Asked by the reducer about gradients, and by `memory.replay` about their sizes. All ranks launch the same order, whichever order
their own gradients come in; so a bucket that is full waits for its turn: it leaves when all before it have left, each once per
round.

    order    a b c d        full: b      full: a         full: d     end of the round
    due                     -            a b             -           c d

Then it is on the wire, with those that were started before. A flat buffer that a bucket keeps may not be written before the
reduction that reads it has ended; one that is borrowed goes with its reduction.

Invariant: within a round every member is due exactly once, in `order`. Every rank starts the same reductions in the same order,
and ends them in that order too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar, final

MAX_IN_FLIGHT = 4
"""Reductions on the wire at once; the next launch waits for the oldest, which bounds the borrowed memory."""

MAX_NBYTES_IN_FLIGHT = 512 << 20
"""Bytes on the wire at once where waiting keeps the stream back and not the host: a large model's buckets are modules, of any size."""

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


class Limit(NamedTuple):
    """How much may be on the wire at once; one reduction always may."""

    reductions: int
    nbytes: int
    """Of their flat buffers."""


UNLIMITED = Limit(2**31, 2**62)


class Started(Protocol):
    """Communication that was started (`comm.exchange.Pending`)."""

    @property
    def is_done(self) -> bool:
        """Whether `wait` would not wait."""
        ...

    def wait(self) -> None:
        """Finish it."""


class Flight(NamedTuple, Generic[T]):
    """A reduction on the wire; `member` keeps its buffer until `pending` has been waited for."""

    member: T
    pending: Started
    nbytes: int
    """Of the flat buffer."""


@final
class InFlight(Generic[T]):
    """What is on the wire: at most `limit`; the next one waits for the oldest. `ended(member)` is called when one was waited for."""

    def __init__(self, limit: Limit, ended: Callable[[T], object]) -> None:
        self.limit = limit
        self._ended = ended
        self.queue: deque[Flight[T]] = deque()
        """In the order in which they were started."""

    def has(self, member: T) -> bool:
        """Whether a reduction of this member is on the wire."""
        return any(other.member is member for other in self.queue)

    def make_room(self, nbytes: int) -> None:
        """A reduction of `nbytes` is about to start while others are on the wire: end those that are done, and the oldest ones if
        it would not fit."""
        while self.queue and (self.queue[0].pending.is_done or not self._has_room(nbytes)):
            self._end_oldest()

    def add(self, member: T, pending: Started, nbytes: int) -> None:
        """It has started."""
        self.queue.append(Flight(member, pending, nbytes))

    @property
    def nbytes(self) -> int:
        """Of the flat buffers of what is on the wire."""
        return sum(other.nbytes for other in self.queue)

    def _has_room(self, nbytes: int) -> bool:
        return len(self.queue) < self.limit.reductions and self.nbytes + nbytes <= self.limit.nbytes

    def end(self, member: T) -> None:
        """Have a flat buffer that stays off the wire before it is written again."""
        while self.has(member):
            self._end_oldest()

    def end_all(self) -> None:
        """Have nothing on the wire."""
        while self.queue:
            self._end_oldest()

    def _end_oldest(self) -> None:
        member, pending, _ = self.queue.popleft()
        pending.wait()
        self._ended(member)
