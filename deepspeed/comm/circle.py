"""A few integers of every rank, known to every rank after ceil(log2(ranks)) small messages.

Made by `mesh` on a gloo group of its own, for what ranks have to agree on while they train. gloo's own all-gather and
all-reduce pass small messages around a ring: their time grows with the number of ranks. Here ranks stand in a circle,
and in round k each hears from the one 2^k places further, which by then knows 2^k ranks:

    5 ranks, what rank 0 knows      0    0 1    0 1 2 3    0 1 2 3 4           distances 1, 2, 4

`largest` keeps one number per word: that some ranks are heard twice does not matter to a maximum, so any number of ranks
will do. `gather` keeps everybody's, and asks in the last round only for those that are still unknown.

Invariant: ranks start their calls on one group in one order; that number is the messages' tag, so that calls may overlap.
After Bruck et al., "Efficient algorithms for all-to-all communications" (1997), section 3, and the dissemination barrier
of Hensgen, Finkel and Manber (1988).
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from deepspeed.utils.waits import COMMUNICATION

T = TypeVar("T")

NUM_TELL_ALL = 4
"""Up to so many ranks tell each other everything at once: no more bytes than the extremes would be, and exact."""

NUM_TAGS = 2**20
"""Tags are used again after so many calls; none is then still on its way."""

WORD_NBYTES = 8


def distances(num_ranks: int) -> list[int]:
    """How far each rank looks around the circle, round by round."""
    return list(itertools.takewhile(lambda d: d < num_ranks, (2**k for k in itertools.count())))


def bytes_of_largest(num_ranks: int, num_words: int) -> int:
    """Bytes that each rank sends for one `largest`."""
    return len(distances(num_ranks)) * num_words * WORD_NBYTES


def bytes_of_gather(num_ranks: int, num_words: int) -> int:
    """Bytes that each rank sends for one `gather`."""
    return (num_ranks - 1) * num_words * WORD_NBYTES


class Ring(Protocol):
    """A few integers of every rank of a group: `Circle`, or `comm.shared.SharedRing` where all of them are on one host."""

    num_calls: int
    """Calls begun, the same number on every rank that is in step."""

    def start_largest(self, words: Sequence[int]) -> Callable[[], tuple[int, ...]]:
        """Begin to find, word by word, the largest of all ranks' int64; what is returned waits for it. Collective."""

    def start_gather(self, words: Sequence[int]) -> Callable[[], list[tuple[int, ...]]]:
        """Begin to gather all ranks' int64; what is returned waits, and gives them in rank order. Collective."""


@final
class Agreement:
    """How the ranks of one group agree on integers that usually are the same everywhere, again and again; waits are counted.

    `rings[dims]` is the group's ring; `make` has it made where it is not there, at first use.
    """

    def __init__(
        self, num_ranks: int, rings: Mapping[tuple[str, ...], Ring], dims: tuple[str, ...], make: Callable[[], Ring]
    ) -> None:
        self._num_ranks = num_ranks
        self._rings, self._dims, self._make = rings, dims, make

    def __call__(self, *values: int) -> list[tuple[int, ...]]:
        """Tell every rank some int64; theirs in rank order. Collective, and waits on the host.

        If they are the same everywhere, that takes one small all-reduce; if not, a gather more.
        """
        return self.start(*values)()

    def start(self, *values: int) -> Callable[[], list[tuple[int, ...]]]:
        """Begin it; what is returned waits for the others. Every rank begins, and ends, them in one order."""
        num_ranks = self._num_ranks
        if num_ranks == 1:
            return lambda: [values]
        ring = self._rings.get(self._dims) or self._make()
        if num_ranks <= NUM_TELL_ALL:
            return _counted(ring.start_gather(values), bytes_of_gather(num_ranks, len(values)))
        # ~ turns the order round without an overflow, so the largest of ~v is ~ of the smallest v.
        words = (*values, *(~value for value in values))
        wait = _counted(ring.start_largest(words), bytes_of_largest(num_ranks, len(words)))

        def answers() -> list[tuple[int, ...]]:
            found = wait()
            largest, smallest = found[: len(values)], tuple(~value for value in found[len(values) :])
            return [largest] * num_ranks if largest == smallest else self.gather(*values)

        return answers

    def gather(self, *values: int) -> list[tuple[int, ...]]:
        """The same, for what usually differs from rank to rank."""
        if self._num_ranks == 1:
            return [values]
        ring = self._rings.get(self._dims) or self._make()
        return _counted(ring.start_gather(values), bytes_of_gather(self._num_ranks, len(values)))()


def _counted(wait: Callable[[], T], nbytes: int) -> Callable[[], T]:
    """`wait`, whose time is one of the step's waits."""

    def counted() -> T:
        start_s = time.perf_counter()
        found = wait()
        COMMUNICATION.host_s += time.perf_counter() - start_s
        COMMUNICATION.nbytes["zero.agree"] += nbytes
        return found

    return counted


class Circle:
    """This rank's place among the ranks of a gloo group."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._rank, self._num_ranks = group.rank(), group.size()
        self._distances = distances(self._num_ranks)
        self.num_calls = 0
        # See Note [Letting go of gloo's buffers] in `comm.exchange`.
        self._retired: deque[dist.Work] = deque(maxlen=64)

    def start_largest(self, words: Sequence[int]) -> Callable[[], tuple[int, ...]]:
        """See Ring."""
        tag = self._next_tag()
        best = torch.tensor(words, dtype=torch.int64)
        heard = torch.empty_like(best)
        # The first message leaves now, whatever this rank does until it waits.
        works = self._trade(best, heard, self._distances[0], tag)

        def finish() -> tuple[int, ...]:
            known, arriving, waiting = best, heard, works
            for i in range(len(self._distances)):
                if i:
                    waiting = self._trade(known, arriving := torch.empty_like(known), self._distances[i], tag)
                self._wait(waiting)
                known = torch.maximum(known, arriving)
            return tuple(known.tolist())

        return finish

    def start_gather(self, words: Sequence[int]) -> Callable[[], list[tuple[int, ...]]]:
        """See Ring."""
        tag = self._next_tag()
        known = torch.empty(self._num_ranks, len(words), dtype=torch.int64)
        """[num_ranks, words]; row i is of the rank i places further."""
        known[0] = torch.tensor(words, dtype=torch.int64)
        works = self._trade(known[:1], known[1:2], self._distances[0], tag)

        def finish() -> list[tuple[int, ...]]:
            waiting = works
            for i, distance in enumerate(self._distances):
                if i:
                    count = min(distance, self._num_ranks - distance)
                    waiting = self._trade(known[:count], known[distance : distance + count], distance, tag)
                self._wait(waiting)
            rows = [tuple(row) for row in known.tolist()]
            return rows[-self._rank :] + rows[: -self._rank] if self._rank else rows

        return finish

    def _next_tag(self) -> int:
        self.num_calls += 1
        return 1 + self.num_calls % NUM_TAGS

    def _trade(self, mine: Tensor, theirs: Tensor, distance: int, tag: int) -> list[dist.Work]:
        """Receive from the rank `distance` further, send to the one that looks at this rank from as far."""
        source, target = (self._rank + distance) % self._num_ranks, (self._rank - distance) % self._num_ranks
        return [self._group.recv([theirs], source, tag), self._group.send([mine], target, tag)]

    def _wait(self, works: Sequence[dist.Work]) -> None:
        for work in works:
            work.wait()
        self._retired.extend(works)
