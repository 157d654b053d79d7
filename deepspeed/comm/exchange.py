"""The data-parallel verbs of ZeRO on flat buffers: all-gather, reduce-scatter and all-reduce, started now, waited later.

Made by `mesh` through `make_exchange`, one per process group; `zero` starts the verbs and keeps the `Pending`.
`full` is always 1-D with `world_size` equal slices, rank r's being `full[r*S:(r+1)*S]`:

    all_gather       own slice of every rank  ->  full on every rank, in place
    reduce_scatter   full of every rank       ->  sum over ranks / divide_by, own slice, into `out`
    all_reduce       full of every rank       ->  sum over ranks / divide_by, in place

Three implementations: `LocalExchange` (one rank: arithmetic only), `CollectiveExchange` (the collectives of
torch.distributed) and `DirectExchange` (gloo on CPU: slices go from rank to rank, straight into place).

Invariants. Every rank starts the same verbs in the same order; any number may be in flight, waited for in any order.
`DirectExchange` adds in rank order, in fp32 where the buffers are narrower, so every rank has the same bits, and an
all-reduce has the bits of a reduce-scatter followed by an all-gather. `CollectiveExchange` adds as its backend does.

Why not gloo's collectives: two ranks, 64 MB of fp32, 2 cores of an AMD EPYC (Zen 3), torch 2.13: all-gather 93 ms
against 28 ms here, reduce-scatter 127 ms against 37 ms, 200 tiny reduce-scatters in flight 141 ms against 30 ms;
all-reduce is on a par. `benchmarks/collectives.py` repeats the measurement.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.13 renames two collectives and warns at every call of the old names.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

TAG = 0xD5
"""Tag of our messages, so that a user's own send and recv on the same group do not mix with them."""

BLOCK_NUMEL = 1 << 18
"""Elements added up at a time: 1 MB of fp32 stays in cache between the passes."""

NARROW = (torch.bfloat16, torch.float16)
"""Dtypes whose sums are made in fp32."""

ONE_PHASE_NUMEL = 1 << 14
"""Up to this size an all-reduce sends whole buffers: one latency instead of two counts for more than the bytes."""

MAX_SCRATCH = 4
"""Scratch buffers of one size kept for reuse, per rank of the group."""

NUM_RETIRED = 32
"""Finished messages kept before they are destroyed; see Note [Letting go of gloo's buffers]."""


@final
class Pending:
    """Communication in flight. It keeps the tensors alive until `wait`, after which the result is in place."""

    __slots__ = ("_finish", "_work")

    def __init__(self, finish: Callable[[], None] | None = None, work: Any = None) -> None:
        self._finish = finish
        self._work = work

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

    def within(self, around: Callable[[Callable[[], None]], None]) -> Pending:
        """The same, taking this one's place: its wait, if there is something to wait for, is `around(finish)`."""
        return self if self._finish is None else Pending(partial(around, self._finish), self._work)

    def wait(self) -> None:
        """Finish; on an accelerator, order the current stream after it. A second call does nothing."""
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()


class Exchange(Protocol):
    """One process group's way of moving flat buffers. `group` is None for a single rank outside torch.distributed."""

    group: ProcessGroup | None
    rank: int
    world_size: int

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


def make_exchange(group: ProcessGroup | None, device: torch.device) -> Exchange:
    """The fastest exchange for buffers on `device`. None means all ranks, or this one where nothing is initialised."""
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return LocalExchange(None)
    group = group or dist.group.WORLD
    assert group is not None, "torch.distributed is initialised, so it has a default group"
    if group.size() == 1:
        return LocalExchange(group)
    if device.type == "cpu" and _backend_for(group, "cpu") == "gloo":
        return DirectExchange(group)
    return CollectiveExchange(group)


def _backend_for(group: ProcessGroup, device_type: str) -> str:
    config = dict(entry.split(":") for entry in str(dist.get_backend_config(group)).split(","))
    return config.get(device_type, "")


def _deliver(value: Tensor, out: Tensor, divide_by: float, accumulate: bool) -> None:
    """Write or add value / divide_by into `out`. `value` may be overwritten, and may be `out` itself to divide it."""
    if divide_by != 1:
        value.div_(divide_by)
    if accumulate:
        out.add_(value)
    elif value.data_ptr() != out.data_ptr():
        out.copy_(value)


class _Ready:
    """The work of a single rank: there is nothing to wait for."""

    def is_completed(self) -> bool:
        """True."""
        return True


@final
class LocalExchange:
    """One rank: nothing moves."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group
        self.rank = 0
        self.world_size = 1

    def start_all_gather(self, full: Tensor, shard: Tensor | None = None) -> Pending:
        """See Exchange."""
        if shard is not None:
            full.copy_(shard)
        return Pending()

    def start_reduce_scatter(self, full: Tensor, out: Tensor, *, divide_by: float = 1, accumulate: bool) -> Pending:
        """See Exchange."""
        return Pending(partial(_deliver, full, out, divide_by, accumulate), _Ready())

    def start_all_reduce(self, full: Tensor, divide_by: float = 1) -> Pending:
        """See Exchange."""
        return Pending(partial(_deliver, full, full, divide_by, False), _Ready())

    def broadcast(self, full: Tensor, source: int = 0) -> None:
        """See Exchange."""


@final
class CollectiveExchange:
    """The collectives of torch.distributed, asynchronous; sums are made in the buffer's dtype by the backend."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group: ProcessGroup | None = group
        self.rank = group.rank()
        self.world_size = group.size()

    def start_all_gather(self, full: Tensor, shard: Tensor | None = None) -> Pending:
        """See Exchange."""
        own = _slices(full, self.world_size)[self.rank]
        if shard is None:
            shard = own
        elif shard.dtype != full.dtype:
            shard = own.copy_(shard)
        work = all_gather_single(full, shard, group=self.group, async_op=True)
        return Pending(partial(self._finish, work, None, full, 1, False))

    def start_reduce_scatter(self, full: Tensor, out: Tensor, *, divide_by: float = 1, accumulate: bool) -> Pending:
        """See Exchange."""
        needs_copy = accumulate or out.dtype != full.dtype
        mine = torch.empty(out.numel(), dtype=full.dtype, device=full.device) if needs_copy else out
        work = reduce_scatter_single(mine, full, group=self.group, async_op=True)
        return Pending(partial(self._finish, work, mine, out, divide_by, accumulate, full), work)

    def start_all_reduce(self, full: Tensor, divide_by: float = 1) -> Pending:
        """See Exchange."""
        work = dist.all_reduce(full, group=self.group, async_op=True)
        return Pending(partial(self._finish, work, full, full, divide_by, False))

    def broadcast(self, full: Tensor, source: int = 0) -> None:
        """See Exchange."""
        dist.broadcast(full, group=self.group, group_src=source)

    def _finish(
        self, work: Any, value: Tensor | None, out: Tensor, divide_by: float, accumulate: bool, *kept: Tensor
    ) -> None:
        work.wait()
        if value is not None:
            _deliver(value, out, divide_by, accumulate)


@final
class DirectExchange:
    """Slices sent from rank to rank over gloo, received in place or in scratch, added up here.

    Note [Letting go of gloo's buffers]
        Destroying a gloo message spins until gloo's own thread has let go of it. Right after the wait that thread is
        often still runnable but not running, and the spin takes it the rest of the scheduler's tick: 4 ms instead of
        0.2 ms for a small message (two cores, Linux 6.18, HZ=250). So finished messages are kept a little while.

    Note [Two-phase all-reduce]
        With three ranks or more and large buffers, an all-reduce is a reduce-scatter and then an all-gather that only
        the wait can start. Before a wait blocks, it starts the second phase of every all-reduce started earlier; so
        the rank that waits for the earliest one always gets what it needs, in whatever order ranks wait.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self.group: ProcessGroup | None = group
        self.rank = group.rank()
        self.world_size = group.size()
        self._peers = [(self.rank + k) % self.world_size for k in range(1, self.world_size)]
        self._pool: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        self._totals: dict[torch.dtype, Tensor] = {}
        self._retired: deque[dist.Work] = deque(maxlen=NUM_RETIRED * len(self._peers))
        self._first_phases: deque[Pending] = deque()

    def start_all_gather(self, full: Tensor, shard: Tensor | None = None) -> Pending:
        """See Exchange."""
        slices = _slices(full, self.world_size)
        if shard is not None:
            slices[self.rank].copy_(shard)
        return Pending(partial(self._wait, self._launch_all_gather(slices)))

    def start_reduce_scatter(self, full: Tensor, out: Tensor, *, divide_by: float = 1, accumulate: bool) -> Pending:
        """See Exchange. By gloo's all-to-all, which unlike its send and recv can tell whether it is done."""
        received = self._take(full)
        work = dist.all_to_all_single(received, full, group=self._group, async_op=True)

        def finish() -> None:
            work.wait()
            self._add_up(_slices(received, self.world_size), out, divide_by, accumulate)
            self._give_back([received])

        return Pending(finish, work)

    def start_all_reduce(self, full: Tensor, divide_by: float = 1) -> Pending:
        """See Exchange."""
        if self.world_size == 2 or full.numel() <= ONE_PHASE_NUMEL:
            return self._launch_sum([full] * self.world_size, full, divide_by, False)
        slices = list(full.tensor_split(self.world_size))
        second: list[dist.Work] = []

        def start_second(first: Pending) -> None:
            first.wait()
            second.extend(self._launch_all_gather(slices))

        reduced = self._launch_sum(slices, slices[self.rank], divide_by, False)
        phase = Pending(partial(start_second, reduced))
        self._first_phases.append(phase)

        def finish() -> None:
            while phase in self._first_phases:
                self._first_phases.popleft().wait()
            self._wait(second)

        return Pending(finish)

    def broadcast(self, full: Tensor, source: int = 0) -> None:
        """See Exchange."""
        dist.broadcast(full, group=self._group, group_src=source)

    def _launch_all_gather(self, slices: Sequence[Tensor]) -> list[dist.Work]:
        """Send this rank's slice to every peer, receive theirs in place."""
        return self._launch([slices[self.rank]] * self.world_size, slices)

    def _launch_sum(self, to_rank: Sequence[Tensor], out: Tensor, divide_by: float, accumulate: bool) -> Pending:
        """Send to_rank[peer] to every peer; their buffers for this rank and to_rank[rank], added up, go to `out`."""
        own = to_rank[self.rank]
        parts = [own if rank == self.rank else self._take(own) for rank in range(self.world_size)]
        works = self._launch(to_rank, parts)

        def finish() -> None:
            self._wait(works)
            self._add_up(parts, out, divide_by, accumulate)
            self._give_back(part for part in parts if part is not own)

        return Pending(finish)

    def _launch(self, to_rank: Sequence[Tensor], from_rank: Sequence[Tensor]) -> list[dist.Work]:
        """Start receiving from_rank[peer] from, and sending to_rank[peer] to, every peer."""
        receives = [self._group.recv([from_rank[p]], p, TAG) for p in reversed(self._peers) if from_rank[p].numel()]
        sends = [self._group.send([to_rank[p]], p, TAG) for p in self._peers if to_rank[p].numel()]
        return receives + sends

    def _wait(self, works: Sequence[dist.Work]) -> None:
        for work in works:
            work.wait()
        self._retired.extend(works)

    def _add_up(self, parts: Sequence[Tensor], out: Tensor, divide_by: float, accumulate: bool) -> None:
        """Sum `parts` in order, divide, and write or add into `out`, which may be one of them."""
        dtype = torch.float32 if parts[0].dtype in NARROW else parts[0].dtype
        if dtype not in self._totals:
            self._totals[dtype] = torch.empty(BLOCK_NUMEL, dtype=dtype)
        total = self._totals[dtype]
        if out.numel() <= BLOCK_NUMEL:
            _add_up_block(total[: out.numel()], parts, out, divide_by, accumulate)
            return
        blocks = zip(out.split(BLOCK_NUMEL), *(part.split(BLOCK_NUMEL) for part in parts), strict=True)
        for target, *pieces in blocks:
            _add_up_block(total[: target.numel()], pieces, target, divide_by, accumulate)

    def _take(self, like: Tensor) -> Tensor:
        """Scratch of `like`'s length and dtype. It is kept for reuse: touching fresh pages costs more than copying."""
        free = self._pool.get((like.numel(), like.dtype))
        return free.pop() if free else torch.empty_like(like)

    def _give_back(self, scratch: Iterable[Tensor]) -> None:
        for tensor in scratch:
            free = self._pool.setdefault((tensor.numel(), tensor.dtype), [])
            if len(free) < MAX_SCRATCH * self.world_size:
                free.append(tensor)


def _add_up_block(total: Tensor, parts: Sequence[Tensor], out: Tensor, divide_by: float, accumulate: bool) -> None:
    """Sum at least two `parts` in order into `total`, divide, and write or add into `out`."""
    if total.dtype == parts[0].dtype:
        torch.add(parts[0], parts[1], out=total)
    else:
        total.copy_(parts[0]).add_(parts[1])
    for part in parts[2:]:
        total.add_(part)
    if accumulate or divide_by == 1:
        _deliver(total, out, divide_by, accumulate)
    else:
        torch.div(total, divide_by, out=out)


def _slices(full: Tensor, world_size: int) -> list[Tensor]:
    """Every rank's slice [S] of `full` [W*S]."""
    assert full.dim() == 1, f"not a flat buffer: {tuple(full.shape)}"
    assert full.numel() % world_size == 0, f"{full.numel()} elements are not {world_size} equal slices"
    return list(full.tensor_split(world_size))
