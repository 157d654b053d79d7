"""A buffer's all-gathers with a copy near by: the first after an update asks all ranks, later ones the near ones alone.

Made by `zero.build` for each sharded bucket where `zero_hpz_partition_size` is more than 1; the bucket sees an exchange.
The copy is a second, coarser sharding: of a gathered buffer this rank keeps the slice that is its among the near ranks.

    inner   8 ranks   full = 0 1 2 3 4 5 6 7      near   4 ranks (a node)   full = 01 23 45 67      rank 5 keeps 23

Invariant: what a gather delivers has the same bits whichever ranks it asked. The copy is taken from gathered values when
their gather is waited for, and is stale from `invalidate` on, which every rank calls at the same places of the order of
gathers; so all ranks ask the same ones.

After ZeRO++ (arXiv:2306.10209), section 4.2 (hpZ). Different from the paper: the copy is kept in the parameters' dtype,
and stays good over micro-batches and evaluations until the weights change.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from deepspeed.comm.exchange import Exchange, OwnGathers, Pending


@final
class SecondaryExchange(OwnGathers):
    """An exchange of one flat buffer, which keeps this rank's slice of it among `near` ranks (see the module's text).

    The number of near ranks divides that of `inner`'s. Every verb but the all-gather is `inner`'s own.
    """

    def __init__(self, inner: Exchange, near: Exchange) -> None:
        assert inner.world_size % near.world_size == 0, f"{near.world_size} does not divide {inner.world_size}"
        super().__init__(inner)
        self._near = near
        self._copy: Tensor | None = None
        self._is_fresh = False

    @property
    def needs_shard(self) -> bool:
        """See Exchange."""
        return not self._is_fresh

    @property
    def nbytes(self) -> int:
        """Bytes of the copy, once it was made."""
        return 0 if self._copy is None else self._copy.nbytes

    def invalidate(self) -> None:
        """See Exchange."""
        self._is_fresh = False

    def start_all_gather(self, full: Tensor, shard: Tensor | None = None) -> Pending:
        """See Exchange."""
        if self._is_fresh:
            return self._near.start_all_gather(full, self._copy)
        self._is_fresh = True
        gather = self._inner.start_all_gather(full, shard)

        def finish() -> None:
            gather.wait()
            self._keep(full)

        return Pending(finish)

    def _keep(self, full: Tensor) -> None:
        numel = full.numel() // self._near.world_size
        own = full.narrow(0, self._near.rank * numel, numel)
        if self._copy is None:
            self._copy = torch.empty_like(own)
        self._copy.copy_(own)
