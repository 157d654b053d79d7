"""Over gloo on CPUs, straight from rank to rank: slices of flat buffers (`DirectExchange`), and a few integers (`Circle`).

Slices go into place, and are added up here. Adds in rank order, in fp32 where the buffers are narrower, so every rank has the same bits, and an all-reduce has the
bits of a reduce-scatter followed by an all-gather.

Why not gloo's collectives: two ranks, 64 MB of fp32, 2 cores of an AMD EPYC (Zen 3), torch 2.13: all-gather 93 ms
against 28 ms here, reduce-scatter 127 ms against 37 ms, 200 tiny reduce-scatters in flight 141 ms against 30 ms;
all-reduce is on a par. `benchmarks/collectives.py` repeats the measurement.

Integers of every rank are known to every rank after ceil(log2(ranks)) small messages; gloo's own all-gather and all-reduce
pass them around a ring, in a time that grows with the number of ranks. Here ranks stand in a circle, and in round k each hears
from the one 2^k places further, which by then knows 2^k ranks:

    5 ranks, what rank 0 knows      0    0 1    0 1 2 3    0 1 2 3 4           distances 1, 2, 4

`largest` keeps one number per word: that some ranks are heard twice does not matter to a maximum, so any number of ranks
will do. `gather` keeps everybody's, and asks in the last round only for those that are still unknown.

Invariant: ranks start their calls on one group in one order; a circle's number of the call is its messages' tag, so that calls
may overlap. After Bruck et al., "Efficient algorithms for all-to-all communications" (1997), section 3, and the dissemination
barrier of Hensgen, Finkel and Manber (1988).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from deepspeed.comm.exchange import Pending, Scratch, distances, slices_of, verb
from deepspeed.kernels.table import pick
from deepspeed.utils.waits import COMMUNICATION

TAG = 0xD5
"""Tag of our messages, so that a user's own send and recv on the same group do not mix with them."""

ONE_PHASE_NUMEL = 1 << 14
"""Up to this size an all-reduce sends whole buffers: one latency instead of two counts for more than the bytes."""

SECOND_TAG = 0xD6
"""Of second phases: ranks start them at moments of their own, between other messages, but all in one order."""

NUM_TAGS = 2**20
"""A circle's tags are used again after so many calls; none is then still on its way."""

NUM_RETIRED = 32
"""Finished messages kept before they are destroyed; see Note [Letting go of gloo's buffers]."""


def ranks_met(rank: int, world_size: int) -> range:
    """Whose slices `rank` receives in a reduce-scatter. An all-to-all sends contiguous memory: the first rank and the last leave
    their own slice out, one between others copies it with theirs."""
    return range(rank == 0, world_size - (rank == world_size - 1 > 0))


@final
class DirectExchange:
    """Slices sent from rank to rank over gloo, received in place or in scratch, added up here.

    Note [Letting go of gloo's buffers]
        Destroying a gloo message spins until gloo's own thread has let go of it. Right after the wait that thread is
        often still runnable but not running, and the spin takes it the rest of the scheduler's tick: 4 ms instead of
        0.2 ms for a small message (two cores, Linux 6.18, HZ=250). So finished messages are kept a little while.

    Note [Two-phase all-reduce]
        With large buffers, an all-reduce is a reduce-scatter and then an all-gather that can start only when this rank has added
        up its own slice. Whenever another one is started, those at the head of the queue whose first phase has ended
        start their second, which so passes while the backward goes on. Before a wait blocks, it starts the second phase of
        every all-reduce started earlier; so the rank that waits for the earliest one always gets what it needs, in whatever
        order ranks wait.
    """

    needs_shard = True
    is_watched = False
    """See `comm.exchange.verb`."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self.group: ProcessGroup | None = group
        self.rank = group.rank()
        self.world_size = group.size()
        self._met = ranks_met(self.rank, self.world_size)
        self._peers = [(self.rank + k) % self.world_size for k in range(1, self.world_size)]
        self.scratch = Scratch()
        self.add_up = pick("add_up", "cpu")
        """See `kernels.reference.sums`."""
        self._retired: deque[dist.Work] = deque(maxlen=NUM_RETIRED * len(self._peers))
        self.first_phases: deque[Pending] = deque()
        """Of all-reduces whose second has not been started, in the order in which they were."""

    def invalidate(self) -> None:
        """See Exchange. Nothing is kept."""

    @verb
    def start_all_gather(self, full: Tensor, shard: Tensor | None = None) -> Pending:
        """See Exchange."""
        slices = slices_of(full, self.world_size)
        if shard is not None:
            slices[self.rank].copy_(shard)
        return Pending(partial(self._wait, self._launch([slices[self.rank]] * self.world_size, slices)))

    @verb
    def start_reduce_scatter(self, full: Tensor, out: Tensor, *, divide_by: float = 1, accumulate: bool) -> Pending:
        """See Exchange."""
        self._advance()
        received = self.scratch.take(len(self._met) * (full.numel() // self.world_size), full.dtype)
        return self._start_sum(slices_of(full, self.world_size), full, received, out, divide_by, accumulate)

    @verb
    def start_all_reduce(self, full: Tensor, divide_by: float = 1) -> Pending:
        """See Exchange."""
        self._advance()
        if full.numel() <= ONE_PHASE_NUMEL:
            return self._start_sum_of_wholes(full, divide_by)
        slices = list(full.tensor_split(self.world_size))
        own = slices[self.rank]
        received = self.scratch.take(len(self._met) * len(own), full.dtype)
        first = self._start_sum(list(slices), full, received, own, divide_by, False)
        second: list[dist.Work] = []
        first = first.then(lambda: second.extend(self._launch([own] * self.world_size, slices, SECOND_TAG)))
        self.first_phases.append(first)

        def finish() -> None:
            while first in self.first_phases:
                self.first_phases.popleft().wait()
            self._wait(second)

        return Pending(finish)

    def broadcast(self, full: Tensor, source: int = 0) -> None:
        """See Exchange."""
        # Gloo knows no complex numbers before torch 2.7.
        whole = torch.view_as_real(full) if full.is_complex() else full
        with COMMUNICATION.during("zero.broadcast", full.nbytes):
            dist.broadcast(whole, group=self._group, group_src=source)

    def _advance(self) -> None:
        """Start the second phases that can be; see Note [Two-phase all-reduce]."""
        while self.first_phases and self.first_phases[0].is_done:
            self.first_phases.popleft().wait()

    def _start_sum(
        self, slices: list[Tensor], full: Tensor, received: Tensor, out: Tensor, divide_by: float, accumulate: bool
    ) -> Pending:
        """Every rank's own one of the `slices` of `full`, `received` from the ranks met and added up into `out`.

        By gloo's all-to-all, which unlike its send and recv can tell whether it is done.
        """
        met, numel = self._met, len(slices[self.rank])
        sizes, from_rank = list(map(len, slices)), [numel] * self.world_size
        if self.rank not in met:
            sizes[self.rank] = from_rank[self.rank] = 0
        sent = full.narrow(0, numel * met.start, sum(sizes))
        work = dist.all_to_all_single(received, sent, from_rank, sizes, group=self._group, async_op=True)

        def finish() -> None:
            work.wait()
            for rank, part in zip(met, slices_of(received, len(met)), strict=True):
                slices[rank] = part
            self.add_up(slices, out, divide_by, accumulate)
            self.scratch.give_back([received])

        return Pending(finish, work)

    def _start_sum_of_wholes(self, full: Tensor, divide_by: float) -> Pending:
        """All that every rank has goes to every other one, and is added up there, into `full`."""
        parts = [
            full if rank == self.rank else self.scratch.take(full.numel(), full.dtype)
            for rank in range(self.world_size)
        ]
        works = self._launch([full] * self.world_size, parts)

        def finish() -> None:
            self._wait(works)
            self.add_up(parts, full, divide_by, False)
            if self.scratch.give_back(part for part in parts if part is not full):
                self._retired.clear()  # finished messages hold the memory they were received into

        return Pending(finish)

    def _launch(self, to_rank: Sequence[Tensor], from_rank: Sequence[Tensor], tag: int = TAG) -> list[dist.Work]:
        """Start receiving from_rank[peer] from, and sending to_rank[peer] to, every peer."""
        works: list[dist.Work] = []
        for peer in reversed(self._peers):  # each pair of ranks meets in the order in which the other one sends
            if from_rank[peer].numel():
                works.append(self._group.recv([from_rank[peer]], peer, tag))
        for peer in self._peers:
            if to_rank[peer].numel():
                works.append(self._group.send([to_rank[peer]], peer, tag))
        return works

    def _wait(self, works: Sequence[dist.Work]) -> None:
        for work in works:
            work.wait()
        self._retired.extend(works)


@final
class Circle:
    """This rank's place among the ranks of a gloo group, made for this alone. See `comm.exchange.Ring`."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._rank, self._num_ranks = group.rank(), group.size()
        self._distances = distances(self._num_ranks)
        self.num_calls = 0
        # See Note [Letting go of gloo's buffers].
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
