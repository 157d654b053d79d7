"""What ZeRO asks of the wire: all-gather, reduce-scatter and all-reduce of flat buffers, started now, waited later; and
agreements on a few integers.

The verbs (`Exchange`) and what they give back (`Pending`); the implementations are `local`, `collective`, `direct`
and `shared`, and `choose` picks one. `mesh` makes an exchange per process group; `zero` starts the verbs and keeps the `Pending`.
`full` is always 1-D with `world_size` equal slices, rank r's being `full[r*S:(r+1)*S]`:

    all_gather       own slice of every rank  ->  full on every rank, in place
    reduce_scatter   full of every rank       ->  sum over ranks / divide_by, own slice, into `out`
    all_reduce       full of every rank       ->  sum over ranks / divide_by, in place

Between ranks each verb is a `verb`: how long it is waited for and what it moves is counted there, for the progress line, and
told to `observe` while somebody records it. One function does that for all verbs of all implementations.

What messages are received into is kept for the next, since touching fresh pages costs more than copying. Messages have as
many sizes as a model has buckets, so it is found by size, not by equality (`Shelf`): a block goes to a message that fills at
least half of it. The same rule keeps ZeRO's flat buffers (`zero.gradients`), and predicts them (`memory/replay.py`).

What ranks have to agree on while they train is a few integers (`Agreement`), told around a `Ring`: `direct.Circle`, or
`shared.SharedRing`.

Invariants. Every rank starts the same verbs in the same order; any number may be in flight, waited for in any order. Beyond
what is lent, a shelf keeps no more bytes than `max_kept` of the largest blocks it ever lent.
"""

from __future__ import annotations

import functools
import itertools
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Generic, Protocol, TypeVar, cast, final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from deepspeed.comm import observe
from deepspeed.comm.recorder import Current
from deepspeed.utils.waits import COMMUNICATION

T = TypeVar("T")


@final
class Pending:
    """Communication in flight. It keeps the tensors alive until `wait`, after which the result is in place."""

    __slots__ = ("_finish", "_nbytes", "_op", "_work")

    def __init__(self, finish: Callable[[], None] | None = None, work: Any = None) -> None:
        self._finish = finish
        self._work = work
        self._op, self._nbytes = "", 0

    @property
    def is_done(self) -> bool:
        """Whether `wait` would not wait; False where that cannot be told."""
        return self._finish is None or (self._work is not None and self._work.is_completed())

    def after(self, first: Callable[[], None]) -> Pending:
        """The same communication; `first` is called before it is finished, to have its target ready."""

        def finish() -> None:
            first()
            self.wait()

        return Pending(finish, self._work)

    def then(self, more: Callable[[], None]) -> Pending:
        """The same communication; `more` is called when it is finished."""

        def finish() -> None:
            self.wait()
            more()

        return Pending(finish, self._work)

    def within(self, around: Callable[[Callable[[], None]], None]) -> Pending:
        """The same, taking this one's place: its wait, if there is something to wait for, is `around(finish)`."""
        return self if self._finish is None else Pending(partial(around, self._finish), self._work)

    def counted(self, op: str, nbytes: int) -> Pending:
        """The same one; its wait is one of the step's."""
        self._op, self._nbytes = op, nbytes
        return self

    def wait(self) -> None:
        """Finish; on an accelerator, order the current stream after it. A second call does nothing."""
        finish, self._finish = self._finish, None
        if finish is None:
            return
        if not self._op:
            finish()
            return
        start_s = time.perf_counter()
        finish()
        COMMUNICATION.host_s += time.perf_counter() - start_s
        COMMUNICATION.nbytes[self._op] += self._nbytes


Verb = TypeVar("Verb", bound=Callable[..., Pending])


def verb(start: Verb) -> Verb:
    """A method `start_...` of an exchange between ranks, counted and recorded where the exchange `is_watched`."""
    op = f"zero.{start.__name__.removeprefix('start_')}"

    @functools.wraps(start)
    def started(self: Any, full: Tensor, *args: Any, **kwargs: Any) -> Pending:
        if not self.is_watched:
            return start(self, full, *args, **kwargs)
        nbytes = full.nbytes  # before: a verb may give the storage away
        pending = start(self, full, *args, **kwargs)
        if Current.recorder is None and not COMMUNICATION.times_device:
            return pending.counted(op, nbytes)
        alone = partial(start, self)
        return pending.within(observe.wait_of(op, nbytes, self.group, alone, (full, *args), kwargs))

    return cast(Verb, started)


class Exchange(Protocol):
    """One process group's way of moving flat buffers. `group` is None for a single rank outside torch.distributed."""

    group: ProcessGroup | None
    rank: int
    world_size: int

    @property
    def needs_shard(self) -> bool:
        """Whether the next all-gather reads this rank's slice; False where it has a copy that will do."""

    def invalidate(self) -> None:
        """Slices are about to change, on every rank: copies made of them are stale."""

    def start_all_gather(self, full: Tensor, shard: Tensor | None = None) -> Pending:
        """Fill `full` [W*S] with every rank's slice; this rank's is `shard` [S], or in place already if None."""

    def start_reduce_scatter(self, full: Tensor, out: Tensor, *, divide_by: float = 1, accumulate: bool) -> Pending:
        """Sum `full` [W*S] over ranks, divide, and write or add this rank's slice into `out` [S] (any float dtype).

        `out` may be this rank's slice of `full`. Neither may be touched before the wait; `full` is then scratch.
        """

    def start_all_reduce(self, full: Tensor, divide_by: float = 1) -> Pending:
        """Sum `full` (any length) over ranks and divide, in place."""

    def broadcast(self, full: Tensor, source: int = 0) -> None:
        """Give every rank the values of the rank `source` of the group, now."""


class OwnGathers:
    """Base of exchanges that gather in a way of their own, and do the rest by another, `inner`."""

    def __init__(self, inner: Exchange) -> None:
        self._inner = inner
        self.group, self.rank, self.world_size = inner.group, inner.rank, inner.world_size

    @property
    def needs_shard(self) -> bool:
        """See Exchange."""
        return True

    def invalidate(self) -> None:
        """See Exchange. Nothing is kept."""

    def start_reduce_scatter(self, full: Tensor, out: Tensor, *, divide_by: float = 1, accumulate: bool) -> Pending:
        """See Exchange."""
        return self._inner.start_reduce_scatter(full, out, divide_by=divide_by, accumulate=accumulate)

    def start_all_reduce(self, full: Tensor, divide_by: float = 1) -> Pending:
        """See Exchange."""
        return self._inner.start_all_reduce(full, divide_by)

    def broadcast(self, full: Tensor, source: int = 0) -> None:
        """See Exchange."""
        self._inner.broadcast(full, source)


def slices_of(full: Tensor, world_size: int) -> list[Tensor]:
    """Every rank's slice [S] of `full` [W*S]."""
    assert full.dim() == 1, f"not a flat buffer: {tuple(full.shape)}"
    assert full.numel() % world_size == 0, f"{full.numel()} elements are not {world_size} equal slices"
    return list(full.tensor_split(world_size))


# Memory to receive into. --------------------------------------------------------------------------------------------

NUM_KEPT = 2
"""What an exchange keeps, in blocks of the largest size."""


@final
class Shelf(Generic[T]):
    """Blocks by size: the smallest that fits is taken, the smallest of all are given up when too much is kept."""

    def __init__(self, max_kept: int) -> None:
        self._max_kept = max_kept
        self._sizes: list[int] = []
        self._blocks: list[T] = []
        self._largest = 0
        self.nbytes = 0
        """Bytes that lie here now."""

    def take(self, nbytes: int) -> tuple[int, T] | None:
        """Size and block for a message of `nbytes`; None: it needs a new one."""
        self._largest = max(self._largest, nbytes)
        at = bisect_left(self._sizes, nbytes)
        if at == len(self._sizes) or self._sizes[at] > 2 * nbytes:
            return None
        self.nbytes -= self._sizes[at]
        return self._sizes.pop(at), self._blocks.pop(at)

    def give_back(self, nbytes: int, block: T) -> list[int]:
        """Lay a block of `nbytes` down; the sizes of those that were given up for it."""
        at = bisect_left(self._sizes, nbytes)
        self._sizes.insert(at, nbytes)
        self._blocks.insert(at, block)
        self.nbytes += nbytes
        given_up = []
        while self.nbytes > self._max_kept * self._largest:
            del self._blocks[0]
            given_up.append(self._sizes.pop(0))
            self.nbytes -= given_up[-1]
        return given_up

    def clear(self) -> None:
        """Give up all that lies here."""
        self._sizes.clear()
        self._blocks.clear()
        self.nbytes = 0


@final
class Scratch:
    """Tensors in main memory, lent and taken back."""

    def __init__(self) -> None:
        self._shelf: Shelf[torch.UntypedStorage] = Shelf(NUM_KEPT)

    @property
    def nbytes(self) -> int:
        """Bytes kept for reuse."""
        return self._shelf.nbytes

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A 1-D tensor, uninitialised."""
        nbytes = numel * dtype.itemsize
        found = self._shelf.take(nbytes)
        storage = found[1] if found is not None else torch.UntypedStorage(nbytes, device="cpu")
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, (numel,), (1,))

    def give_back(self, lent: Iterable[Tensor]) -> bool:
        """Return tensors that `take` gave and that nothing reads any more; whether memory was given up for them."""
        storages = [tensor.untyped_storage() for tensor in lent]
        given_up = [self._shelf.give_back(storage.nbytes(), storage) for storage in storages]
        return any(given_up)

    def clear(self) -> None:
        """Free what is not lent."""
        self._shelf.clear()


# Agreements on a few integers. -------------------------------------------------------------------------------------

NUM_TELL_ALL = 4
"""Up to so many ranks tell each other everything at once: no more bytes than the extremes would be, and exact."""

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
