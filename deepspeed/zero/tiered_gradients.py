"""The gradients of a bucket whose slices rest on a tier: each moves there as it arrives, and is added to there.

Behind `zero.gradients.Gradients`, where what its methods mean is said. ZeRO stages 2 and 3 with offload.

Invariant: a borrowed buffer is given back when its bytes have arrived (`zero.delivery.Moved`).
"""

from __future__ import annotations

import functools
from collections import deque
from typing import NamedTuple, final

import torch
from torch import Tensor

from deepspeed.comm.exchange import Pending
from deepspeed.tiers import Rest, Transfer
from deepspeed.utils.errors import TierError
from deepspeed.zero.bucket import Bucket
from deepspeed.zero.delivery import Moved
from deepspeed.zero.gradients import FlatBuffer, FlatPool, Scattered
from deepspeed.zero.reduction import Reduction


class _Landing(NamedTuple):
    """A reduction on the wire: the borrowed buffer it reads, and where its result goes (the buffer's own slice, or memory of
    its own where it is added to what is at rest)."""

    buffer: FlatBuffer
    into: Tensor


@final
class TieredGradients(Scattered):
    """Each backward's are scattered, and this rank's slice moves to its rest as it arrives, while backward goes on."""

    def __init__(self, bucket: Bucket, reduction: Reduction, dtype: torch.dtype, pool: FlatPool, rest: Rest) -> None:
        super().__init__(bucket, reduction, dtype, pool)
        self.result = torch.empty(0, dtype=dtype, device=bucket.full.device)
        self._moved = Moved(rest, pool)
        self._on_wire: deque[_Landing] = deque()

    @property
    def failure(self) -> TierError | None:
        """See Gradients."""
        return self._moved.failure

    @property
    def nbytes(self) -> int:
        """See Gradients."""
        return self._moved.nbytes

    def start_reduce(self) -> Pending:
        """See Gradients."""
        buffer = self._hand_over()
        wire = self.reduction.to_wire(buffer.flat)
        adds, self.is_reduced = self.is_reduced, True
        into, load = self._own_memory() if adds else (self.bucket.own_slice(buffer.flat), None)
        self._on_wire.append(_Landing(buffer, into))
        pending = self.reduction.exchange.start_reduce_scatter(
            wire, into, divide_by=self.reduction.divide_by, accumulate=adds
        )
        return pending.after(functools.partial(self._moved.load, into, load)) if adds else pending

    def _own_memory(self) -> tuple[Tensor, Transfer | None]:
        """Memory for a result that is added to what is at rest, and the load of that, if it can start already.

        An earlier micro-batch's reduction of this bucket may still be on the wire, since launches do not wait. What it
        brings is then neither on the tier nor on its way there, and the load has to wait until it was taken in.
        """
        into = self._slice()
        return into, None if self._on_wire else self._moved.start_load(into)

    def _slice(self) -> Tensor:
        return torch.empty(self._moved.rest.numel, dtype=self.dtype, device=self.bucket.full.device)

    def finish_reduce(self) -> None:
        """See Gradients."""
        landing = self._on_wire.popleft()
        self._moved.put(landing.into, landing.buffer)

    def complete(self) -> None:
        """See Gradients."""
        if not self.is_reduced:
            self.is_reduced = True
            self.replace(self._slice().zero_())
        if self.reduction.replicas is not None:
            values = self.values()
            self.reduction.average_replicas(values)
            self.replace(values)
        self._moved.wait()

    def norm(self) -> Tensor:
        """See Gradients. Taken when they were last put to rest."""
        assert self._moved.norm is not None, "asked after `complete`"
        return self._moved.norm

    def rest(self) -> Rest:
        """See Gradients."""
        return self._moved.rest

    def values(self) -> Tensor:
        """See Gradients."""
        copy = self._slice()
        self._moved.start_load(copy).wait()
        return copy

    def replace(self, values: Tensor) -> None:
        """See Gradients."""
        self._moved.put(values)
        self._moved.wait()

    def drop(self) -> None:
        """See Gradients."""
        self._moved.forget()
        super().drop()
