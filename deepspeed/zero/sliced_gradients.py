"""The gradients of a bucket of which each rank keeps its slice: every backward's are scattered, and the flat buffer is borrowed.

Behind `zero.gradients.Gradients`, where what its methods mean is said. ZeRO stages 2 and 3:

    SlicedGradients   the slice [S] stays in the device's memory, and micro-batches add up in it
    TieredGradients   it moves to its rest on a tier as it arrives, and is added to there

Invariant: a borrowed buffer belongs to the wire from `start_reduce` to `finish_reduce`; finishing is in the order of starting.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from deepspeed.comm.exchange import Pending
from deepspeed.tiers import InMemory, Rest, Transfer
from deepspeed.utils.errors import TierError
from deepspeed.zero.arrivals import Arrivals
from deepspeed.zero.bucket import Bucket
from deepspeed.zero.delivery import Moved, norm_of
from deepspeed.zero.pool import FlatBuffer, FlatPool
from deepspeed.zero.reduction import Reduction


class _Scattered(ABC):
    """What both are: gradients in a flat buffer that the bucket borrows from the pool, from the first of them to their reduction."""

    is_whole = False
    shown: Sequence[Tensor] = ()
    local_views: Sequence[Tensor] = ()

    def __init__(self, bucket: Bucket, reduction: Reduction, dtype: torch.dtype, pool: FlatPool) -> None:
        self.bucket, self.reduction, self.dtype = bucket, reduction, dtype
        self.arrivals = Arrivals(len(bucket.params))
        self.is_reduced = False
        self._pool = pool
        self._buffer: FlatBuffer | None = None

    @property
    def has_local(self) -> bool:
        """See Gradients."""
        return self._buffer is not None

    def sums(self) -> Sequence[Tensor]:
        """See Gradients."""
        return self._buffer.views_of(self.bucket) if self._buffer is not None else ()

    def lay_down(self) -> None:
        """See Gradients."""
        buffer, adds = self._buffer, self._buffer is not None
        if buffer is None:
            layout = self.bucket.layout
            buffer = self._buffer = self._pool.take(layout.padded_numel, self.dtype, self.bucket.full.device)
            buffer.flat[layout.numel :].zero_()
        self.arrivals.lay_into(buffer.views_of(self.bucket), adds)

    def _hand_over(self) -> FlatBuffer:
        """The buffer, which belongs to a reduction now; the next backward takes another."""
        buffer, self._buffer = self._buffer, None
        assert buffer is not None, "nothing was laid down"
        return buffer

    def keep_local(self) -> None:
        """See Gradients."""
        raise AssertionError("each backward's are reduced: nothing stays this rank's own")

    def take_missed_flag(self) -> Tensor | None:
        """See Gradients. It travels with the norm."""
        return None

    @abstractmethod
    def start_reduce(self) -> Pending:
        """See Gradients."""

    @abstractmethod
    def finish_reduce(self) -> None:
        """See Gradients."""

    def drop(self) -> None:
        """See Gradients."""
        self.arrivals.forget()
        self.arrivals.end_step()
        if self._buffer is not None:
            self._pool.give_back(self._hand_over())
        self.is_reduced = False


@final
class SlicedGradients(_Scattered):
    """Each backward's are scattered into this rank's slice, where they add up."""

    failure: TierError | None = None

    def __init__(self, bucket: Bucket, reduction: Reduction, dtype: torch.dtype, pool: FlatPool) -> None:
        super().__init__(bucket, reduction, dtype, pool)
        self._goes_as_it_is = reduction.predivide == 1.0 and reduction.wire_dtype in (None, dtype)
        self._on_wire: deque[FlatBuffer] = deque()

    @functools.cached_property
    def result(self) -> Tensor:
        """See Gradients. [S], from the first reduction on."""
        return torch.zeros(self.bucket.layout.shard_numel, dtype=self.dtype, device=self.bucket.full.device)

    @functools.cached_property
    def _resident(self) -> Rest:
        return InMemory(self.result)

    @property
    def nbytes(self) -> int:
        """See Gradients."""
        return self.result.nbytes if "result" in vars(self) else 0

    def start_reduce(self) -> Pending:
        """See Gradients."""
        buffer = self._hand_over()
        wire = buffer.flat if self._goes_as_it_is else self.reduction.to_wire(buffer.flat)
        self._on_wire.append(buffer)
        accumulate, self.is_reduced = self.is_reduced, True
        return self.reduction.exchange.start_reduce_scatter(
            wire, self.result, divide_by=self.reduction.divide_by, accumulate=accumulate
        )

    def finish_reduce(self) -> None:
        """See Gradients."""
        self._pool.give_back(self._on_wire.popleft())

    def complete(self) -> None:
        """See Gradients."""
        if not self.is_reduced:
            self.result.zero_()
            self.is_reduced = True
        self.reduction.average_replicas(self.result)

    def norm(self) -> Tensor:
        """See Gradients."""
        return norm_of(self.result)

    def rest(self) -> Rest:
        """See Gradients."""
        return self._resident

    def values(self) -> Tensor:
        """See Gradients."""
        return self.result

    def replace(self, values: Tensor) -> None:
        """See Gradients. They were changed in place."""


class _Landing(NamedTuple):
    """A reduction on the wire: the borrowed buffer it reads, and where its result goes (the buffer's own slice, or memory of
    its own where it is added to what is at rest)."""

    buffer: FlatBuffer
    into: Tensor


@final
class TieredGradients(_Scattered):
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
