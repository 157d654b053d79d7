"""An all-reduce that sends what is not zero: for gradients of embeddings, of which a batch touches few rows.

Chosen by `assembly.exchanges` where the configuration says `sparse_gradients`; wraps another exchange, which takes over where
sending everything is no more. A buffer is cut into blocks of BLOCK elements; each rank sends the blocks that are not zero.

    1  how many blocks each rank has        one small all-gather, waited for at once: what follows depends on it
    2  their numbers and elements           one all-gather, padded to the largest rank's
    3  added up in rank order, divided

The first message blocks. That is right where nothing else has to be served while a backward runs, which is stage 0, where
parameters are whole on every rank.

Invariant: the sums of the wrapped exchange: in rank order, in fp32 where the buffer is narrower.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from deepspeed.comm.collective import all_gather_single
from deepspeed.comm.exchange import Exchange, Pending
from deepspeed.utils.waits import COMMUNICATION

BLOCK = 64
MIN_BLOCKS = 1024
"""Below, a message for the count costs more than it can save."""


@final
class SparseReduction:
    """All-reduces by blocks that are not zero; every other verb is `inner`'s."""

    needs_shard = True

    def __init__(self, inner: Exchange, min_blocks: int = MIN_BLOCKS) -> None:
        self._inner, self._min_blocks = inner, min_blocks
        self.group, self.rank, self.world_size = inner.group, inner.rank, inner.world_size

    def invalidate(self) -> None:
        """See Exchange. Nothing is kept."""

    def start_all_reduce(self, full: Tensor, divide_by: float = 1) -> Pending:
        """See Exchange. Waits for the number of blocks on every rank."""
        num_blocks = full.numel() // BLOCK
        if full.numel() % BLOCK or num_blocks < self._min_blocks:
            return self._inner.start_all_reduce(full, divide_by)
        blocks = full.view(num_blocks, BLOCK)
        mine = (blocks != 0).any(1).nonzero().view(-1)  # the host waits here
        counts = self._counts(len(mine), full.device)
        most = max(counts)
        if most == 0:
            return Pending()
        if most * self.world_size >= num_blocks:
            return self._inner.start_all_reduce(full, divide_by)
        message = torch.zeros(most * (4 + BLOCK * full.dtype.itemsize), dtype=torch.uint8, device=full.device)
        numbers, elements = self._parts(message, most, full.dtype)
        numbers[: len(mine)] = mine.to(torch.int32)
        elements[: len(mine)] = blocks[mine]
        received = message.new_empty(self.world_size * message.numel())
        work = all_gather_single(received, message, group=self.group, async_op=True)
        COMMUNICATION.add(0.0, "zero.sparse_all_reduce", received.nbytes)

        def finish() -> None:
            work.wait()
            self._add_up(received, counts, full, divide_by)

        return Pending(finish)

    def _counts(self, count: int, device: torch.device) -> list[int]:
        mine = torch.tensor([count], dtype=torch.int64, device=device)
        counts = mine.new_empty(self.world_size)
        with COMMUNICATION.during("zero.sparse_count", counts.nbytes):
            all_gather_single(counts, mine, group=self.group)
        return [int(n) for n in counts.tolist()]

    def _parts(self, message: Tensor, most: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(numbers [most] int32, elements [most, BLOCK]) as views of a message: elements first, which keeps both aligned."""
        at = most * BLOCK * dtype.itemsize
        return message[at:].view(torch.int32), message[:at].view(dtype).view(most, BLOCK)

    def _add_up(self, received: Tensor, counts: list[int], full: Tensor, divide_by: float) -> None:
        is_narrow = full.dtype in (torch.bfloat16, torch.float16)
        total = torch.zeros_like(full, dtype=torch.float32) if is_narrow else full.zero_()
        blocks = total.view(-1, BLOCK)
        for count, message in zip(counts, received.view(self.world_size, -1), strict=True):
            numbers, elements = self._parts(message.clone(), max(counts), full.dtype)
            blocks.index_add_(0, numbers[:count].long(), elements[:count].to(total.dtype))
        if divide_by != 1:
            total.div_(divide_by)
        if is_narrow:
            full.copy_(total)

    def start_all_gather(self, full: Tensor, shard: Tensor | None = None) -> Pending:
        """See Exchange."""
        return self._inner.start_all_gather(full, shard)

    def start_reduce_scatter(self, full: Tensor, out: Tensor, *, divide_by: float = 1, accumulate: bool) -> Pending:
        """See Exchange."""
        return self._inner.start_reduce_scatter(full, out, divide_by=divide_by, accumulate=accumulate)

    def broadcast(self, full: Tensor, source: int = 0) -> None:
        """See Exchange."""
        self._inner.broadcast(full, source)
