"""The exchange over the collectives of torch.distributed: for NCCL and every other backend that has good ones.

Sums are made in the buffer's dtype, in the backend's order. The collectives' names, which torch 2.13 changed, are here.
"""

from __future__ import annotations

from functools import partial
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from deepspeed.comm.exchange import Pending, slices_of, verb
from deepspeed.kernels.reference.sums import deliver
from deepspeed.utils.waits import COMMUNICATION

# torch 2.13 renames two collectives and warns at every call of the old names.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@final
class CollectiveExchange:
    """The collectives of torch.distributed, asynchronous; sums are made in the buffer's dtype by the backend."""

    needs_shard = True
    is_watched = False
    """See `comm.exchange.verb`."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group: ProcessGroup | None = group
        self.rank = group.rank()
        self.world_size = group.size()

    def invalidate(self) -> None:
        """See Exchange. Nothing is kept."""

    @verb
    def start_all_gather(self, full: Tensor, shard: Tensor | None = None) -> Pending:
        """See Exchange."""
        own = slices_of(full, self.world_size)[self.rank]
        if shard is None:
            shard = own
        elif shard.dtype != full.dtype:
            shard = own.copy_(shard)
        work = all_gather_single(full, shard, group=self.group, async_op=True)
        return Pending(partial(self._finish, work, None, full, 1, False))

    @verb
    def start_reduce_scatter(self, full: Tensor, out: Tensor, *, divide_by: float = 1, accumulate: bool) -> Pending:
        """See Exchange."""
        needs_copy = accumulate or out.dtype != full.dtype
        mine = torch.empty(out.numel(), dtype=full.dtype, device=full.device) if needs_copy else out
        work = reduce_scatter_single(mine, full, group=self.group, async_op=True)
        return Pending(partial(self._finish, work, mine, out, divide_by, accumulate, full), work)

    @verb
    def start_all_reduce(self, full: Tensor, divide_by: float = 1) -> Pending:
        """See Exchange."""
        work = dist.all_reduce(full, group=self.group, async_op=True)
        return Pending(partial(self._finish, work, full, full, divide_by, False))

    def broadcast(self, full: Tensor, source: int = 0) -> None:
        """See Exchange."""
        with COMMUNICATION.during("zero.broadcast", full.nbytes):
            dist.broadcast(full, group=self.group, group_src=source)

    def _finish(
        self, work: Any, value: Tensor | None, out: Tensor, divide_by: float, accumulate: bool, *kept: Tensor
    ) -> None:
        work.wait()
        if value is not None:
            deliver(value, out, divide_by, accumulate)
