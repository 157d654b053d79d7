"""The exchange over gloo on CPUs: slices go from rank to rank, straight into place, and are added up here.

Adds in rank order, in fp32 where the buffers are narrower, so every rank has the same bits, and an all-reduce has the
bits of a reduce-scatter followed by an all-gather.

Why not gloo's collectives: two ranks, 64 MB of fp32, 2 cores of an AMD EPYC (Zen 3), torch 2.13: all-gather 93 ms
against 28 ms here, reduce-scatter 127 ms against 37 ms, 200 tiny reduce-scatters in flight 141 ms against 30 ms;
all-reduce is on a par. `benchmarks/collectives.py` repeats the measurement.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from deepspeed.comm.exchange import Pending, slices_of, verb
from deepspeed.comm.scratch import Scratch
from deepspeed.kernels.table import pick
from deepspeed.utils.waits import COMMUNICATION

TAG = 0xD5
"""Tag of our messages, so that a user's own send and recv on the same group do not mix with them."""

ONE_PHASE_NUMEL = 1 << 14
"""Up to this size an all-reduce sends whole buffers: one latency instead of two counts for more than the bytes."""

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
        With large buffers, an all-reduce is a reduce-scatter and then an all-gather that only the wait can start: each
        rank adds up its own slice alone. Before a wait blocks, it starts the second phase of every all-reduce started earlier; so
        the rank that waits for the earliest one always gets what it needs, in whatever order ranks wait.
    """

    needs_shard = True
    is_watched = False
    """See `comm.exchange.verb`."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self.group: ProcessGroup | None = group
        self.rank = group.rank()
        self.world_size = group.size()
        self._peers = [(self.rank + k) % self.world_size for k in range(1, self.world_size)]
        self.scratch = Scratch()
        self.add_up = pick("add_up", "cpu")
        """See `kernels.reference.sums`."""
        self._retired: deque[dist.Work] = deque(maxlen=NUM_RETIRED * len(self._peers))
        self._first_phases: deque[Pending] = deque()

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
        """See Exchange. By gloo's all-to-all, which unlike its send and recv can tell whether it is done."""
        met = ranks_met(self.rank, self.world_size)
        slices = slices_of(full, self.world_size)
        numel = len(slices[0])
        sizes = [numel if rank in met else 0 for rank in range(self.world_size)]
        sent = full[met.start * numel : met.stop * numel]
        received = self.scratch.take(sent)
        work = dist.all_to_all_single(received, sent, sizes, sizes, group=self._group, async_op=True)

        def finish() -> None:
            work.wait()
            for rank, part in zip(met, slices_of(received, len(met)), strict=True):
                slices[rank] = part
            self.add_up(slices, out, divide_by, accumulate)
            self.scratch.give_back([received])

        return Pending(finish, work)

    @verb
    def start_all_reduce(self, full: Tensor, divide_by: float = 1) -> Pending:
        """See Exchange."""
        if full.numel() <= ONE_PHASE_NUMEL:
            return self._launch_sum([full] * self.world_size, full, divide_by, False)
        slices = list(full.tensor_split(self.world_size))
        second: list[dist.Work] = []

        def start_second(first: Pending) -> None:
            first.wait()
            second.extend(self._launch([slices[self.rank]] * self.world_size, slices))

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
        # Gloo knows no complex numbers before torch 2.7.
        whole = torch.view_as_real(full) if full.is_complex() else full
        with COMMUNICATION.during("zero.broadcast", full.nbytes):
            dist.broadcast(whole, group=self._group, group_src=source)

    def _launch_sum(self, to_rank: Sequence[Tensor], out: Tensor, divide_by: float, accumulate: bool) -> Pending:
        """Send to_rank[peer] to every peer; their buffers for this rank and to_rank[rank], added up, go to `out`."""
        own = to_rank[self.rank]
        parts = [own if rank == self.rank else self.scratch.take(own) for rank in range(self.world_size)]
        works = self._launch(to_rank, parts)

        def finish() -> None:
            self._wait(works)
            self.add_up(parts, out, divide_by, accumulate)
            if self.scratch.give_back(part for part in parts if part is not own):
                self._retired.clear()  # finished messages hold the memory they were received into

        return Pending(finish)

    def _launch(self, to_rank: Sequence[Tensor], from_rank: Sequence[Tensor]) -> list[dist.Work]:
        """Start receiving from_rank[peer] from, and sending to_rank[peer] to, every peer."""
        works: list[dist.Work] = []
        for peer in reversed(self._peers):  # each pair of ranks meets in the order in which the other one sends
            if from_rank[peer].numel():
                works.append(self._group.recv([from_rank[peer]], peer, TAG))
        for peer in self._peers:
            if to_rank[peer].numel():
                works.append(self._group.send([to_rank[peer]], peer, TAG))
        return works

    def _wait(self, works: Sequence[dist.Work]) -> None:
        for work in works:
            work.wait()
        self._retired.extend(works)
