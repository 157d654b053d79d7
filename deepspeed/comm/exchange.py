"""What ZeRO asks of the wire, on flat buffers: all-gather, reduce-scatter and all-reduce, started now, waited later.

The verbs (`Exchange`) and what they give back (`Pending`); the implementations are `local`, `collective`, `direct`
and `shared`, and `choose` picks one. `mesh` makes an exchange per process group; `zero` starts the verbs and keeps the `Pending`.
`full` is always 1-D with `world_size` equal slices, rank r's being `full[r*S:(r+1)*S]`:

    all_gather       own slice of every rank  ->  full on every rank, in place
    reduce_scatter   full of every rank       ->  sum over ranks / divide_by, own slice, into `out`
    all_reduce       full of every rank       ->  sum over ranks / divide_by, in place

Between ranks each verb is a `verb`: how long it is waited for and what it moves is counted there, for the progress line, and
told to `observe` while somebody records it. One function does that for all verbs of all implementations.

Invariant: every rank starts the same verbs in the same order; any number may be in flight, waited for in any order.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar, cast, final

from torch import Tensor
from torch.distributed import ProcessGroup

from deepspeed.comm import observe
from deepspeed.comm.recorder import Current
from deepspeed.utils.waits import COMMUNICATION


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
