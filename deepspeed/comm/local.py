"""The exchange of a rank that is alone: arithmetic, and nothing moves."""

from __future__ import annotations

from functools import partial
from typing import final

from torch import Tensor
from torch.distributed import ProcessGroup

from deepspeed.comm.exchange import Pending
from deepspeed.kernels.reference.sums import deliver


class _Ready:
    """The work of a single rank: there is nothing to wait for."""

    def is_completed(self) -> bool:
        """True."""
        return True


NOTHING = _Ready()
"""The work of every `Pending` here."""


@final
class LocalExchange:
    """One rank: nothing moves."""

    needs_shard = True

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group
        self.rank = 0
        self.world_size = 1

    def invalidate(self) -> None:
        """See Exchange. Nothing is kept."""

    def start_all_gather(self, full: Tensor, shard: Tensor | None = None) -> Pending:
        """See Exchange."""
        if shard is not None:
            full.copy_(shard)
        return Pending()

    def start_reduce_scatter(self, full: Tensor, out: Tensor, *, divide_by: float = 1, accumulate: bool) -> Pending:
        """See Exchange."""
        return Pending(partial(deliver, full, out, divide_by, accumulate), NOTHING)

    def start_all_reduce(self, full: Tensor, divide_by: float = 1) -> Pending:
        """See Exchange."""
        return Pending(partial(deliver, full, full, divide_by, False), NOTHING)

    def broadcast(self, full: Tensor, source: int = 0) -> None:
        """See Exchange."""
