"""The gradients of one bucket, from their arrival to their placement: laid into a flat buffer, reduced, delivered.

Made by `gradients_of_bucket`, one per trained bucket; driven by `zero.reduce`, which decides when; read by the optimizer. How a
bucket is reduced is a row, `Reduction`, so that buckets with a reduction of their own (experts, compressed communication)
are other rows and not other code. Where gradients live is one of three classes behind `Gradients`:

    WholeGradients    flat [W*S] stays, micro-batches add up in it; at the boundary it is reduced into itself (O replicated)
                      or into this rank's slice of itself, and brought to rest from there      ZeRO stages 0, 1; one rank
    SlicedGradients   flat [W*S] is borrowed for one reduction; the result [S] stays and adds up            stages 2, 3
    TieredGradients   the same, but the result moves to its rest on a tier and is added to there            stages 2, 3

Memory is taken when it is first asked for, in the first backward: while a model is built, cut and handed over there is none.

Invariants. Reductions add up in their destination, so several backward passes in one step are the normal case. Between
`start_reduce` and `finish_reduce` the flat buffer belongs to the wire; finishing is in the order of starting.

After ZeRO (arXiv:1910.02054), section 5.
"""

from __future__ import annotations

import enum
import functools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, final

import torch
from torch import Tensor

from deepspeed.comm.exchange import Exchange, Pending
from deepspeed.comm.feedback import ErrorFeedback
from deepspeed.tiers import InMemory, Rest, Transfer
from deepspeed.utils.errors import TierError
from deepspeed.zero.arrivals import Arrivals
from deepspeed.zero.bucket import Bucket
from deepspeed.zero.delivery import Moved, norm_of
from deepspeed.zero.pool import FlatBuffer, FlatPool


class When(enum.Enum):
    """Which backward passes make a bucket's gradients leave the rank."""

    EACH_BACKWARD = "each backward"
    """There is no full buffer to add micro-batches up in: every one is reduced and added to the result."""
    AT_BOUNDARY = "at the boundary"
    """Micro-batches add up on the rank; the last one of a step has the sum reduced."""
    NEVER = "never"
    """The optimizer communicates in its own way: the rank's own sum is what it gets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reduction:
    """How one bucket's gradients are averaged: over whom, by what, in which dtype on the wire, and when."""

    exchange: Exchange
    """Over the ranks that share the bucket's shards."""
    feedback: Sequence[ErrorFeedback] = ()
    """What the exchange keeps of its messages' errors."""
    replicas: Exchange | None = None
    """Over the ranks that repeat this one's shard, where there are any: averaged with them at the boundary."""
    predivide: float = 1.0
    """Divides before the sum, which keeps low precision from overflowing."""
    divide_by: float = 1.0
    """Divides after the sum."""
    wire_dtype: torch.dtype | None = None
    """None: the gradients' own."""
    when: When = When.AT_BOUNDARY

    @property
    def num_ranks(self) -> int:
        """How many ranks' gradients are averaged."""
        return self.exchange.world_size * (self.replicas.world_size if self.replicas else 1)

    @property
    def share(self) -> float:
        """By what a value that all ranks have alike must be multiplied to come out of the reduction unchanged: 1 for means."""
        return self.predivide * self.divide_by / self.exchange.world_size

    def to_wire(self, flat: Tensor) -> Tensor:
        """The flat buffer as it travels: itself, or a copy in another dtype. Divides it in place."""
        if self.predivide != 1.0:
            flat.div_(self.predivide)
        return flat if self.wire_dtype in (None, flat.dtype) else flat.to(self.wire_dtype)

    def average_replicas(self, values: Tensor) -> None:
        """Average a reduced result with its replicas, in place, now. Collective over them."""
        if self.replicas is not None:
            self.replicas.start_all_reduce(values, divide_by=self.replicas.world_size).wait()


class Gradients(Protocol):
    """What the reducer drives and the step reads."""

    bucket: Bucket
    reduction: Reduction
    dtype: torch.dtype
    arrivals: Arrivals
    is_reduced: bool
    """Whether there are reduced gradients of this step."""

    @property
    def result(self) -> Tensor:
        """[S], or [W*S] where O is replicated: reduced gradients; without elements where they rest on a tier."""

    @property
    def has_local(self) -> bool:
        """Whether the flat buffer holds gradients of this rank alone."""

    @property
    def is_whole(self) -> bool:
        """Whether the flat buffer is their own and stays: a reduction of it must end before `lay_down` may write."""

    @property
    def shown(self) -> Sequence[Tensor]:
        """The parameters' averaged gradients as views, if they are whole on this rank, in memory."""

    @property
    def local_views(self) -> Sequence[Tensor]:
        """This rank's own sums as views, by parameter, where they are whole and stay on the rank (`When.NEVER`)."""

    def sums(self) -> Sequence[Tensor]:
        """What was laid down on this rank and not reduced, as views by parameter; none where nothing was."""

    @property
    def failure(self) -> TierError | None:
        """Gradients of this step that could not be moved to their rest on this rank."""

    @property
    def nbytes(self) -> int:
        """Bytes of gradients at rest between micro-batches, on whatever tier; in memory from the first backward on."""

    def lay_down(self) -> None:
        """Move what arrived into the flat buffer, adding to what is there; missing gradients are zeros."""

    def start_reduce(self) -> Pending:
        """Start averaging the flat buffer over the ranks. Collective: every rank, same order."""

    def finish_reduce(self) -> None:
        """Settle after the oldest reduction ended: give back what was borrowed, add what was put aside."""

    def keep_local(self) -> None:
        """Take this rank's own sum for the result, unreduced."""

    def settle(self) -> None:
        """At the boundary: average with the replicas, and have the gradients complete and at rest. Collective."""

    def take_missed_flag(self) -> Tensor | None:
        """[1], above 0 if any rank missed a gradient, where the reduction brought that along; None where it did not. Call
        once after the reduction, before the norm."""

    def norm(self) -> Tensor:
        """2-norm of this step's reduced gradients on this rank, fp32."""

    def rest(self) -> Rest:
        """Where this step's reduced gradients are, after `settle`."""

    def values(self) -> Tensor:
        """This step's reduced gradients: the bytes themselves, or a copy on the device where they rest on a tier."""

    def replace(self, values: Tensor) -> None:
        """Put back what `values` gave, changed."""

    def drop(self) -> None:
        """Forget this step's gradients, keeping the memory."""


def gradients_of_bucket(
    bucket: Bucket,
    reduction: Reduction,
    dtype: torch.dtype,
    pool: FlatPool,
    *,
    delivers_shard: bool,
    rest: Rest | None = None,
) -> Gradients:
    """The gradients of a bucket whose reduction is `reduction`; they rest in the device's memory, or at `rest`.

    delivers_shard: the optimizer reads this rank's slice, not the whole.
    """
    if reduction.when is not When.EACH_BACKWARD:
        return WholeGradients(bucket, reduction, dtype, pool, delivers_shard=delivers_shard, rest=rest)
    if rest is None:
        return SlicedGradients(bucket, reduction, dtype, pool)
    return TieredGradients(bucket, reduction, dtype, pool, rest)


def leave_local(buckets: Sequence[Gradients], is_local: bool) -> None:
    """From the next step on have gradients that are reduced at the boundary stay on their rank instead, or not any more. The
    same on every rank, between steps."""
    before, after = (When.AT_BOUNDARY, When.NEVER) if is_local else (When.NEVER, When.AT_BOUNDARY)
    for gradients in buckets:
        if gradients.reduction.when is before:
            gradients.reduction = replace(gradients.reduction, when=after)


@final
class WholeGradients:
    """They add up in a flat buffer of their own."""

    is_whole = True

    def __init__(
        self,
        bucket: Bucket,
        reduction: Reduction,
        dtype: torch.dtype,
        pool: FlatPool,
        *,
        delivers_shard: bool,
        rest: Rest | None,
    ) -> None:
        self.bucket, self.reduction, self.dtype = bucket, reduction, dtype
        self.arrivals = Arrivals(len(bucket.params))
        self.is_reduced = self.has_local = False
        self._delivers_shard = delivers_shard
        self._is_shown = (not delivers_shard or reduction.num_ranks == 1) and rest is None and not bucket.is_sharded
        self._moved = None if rest is None else Moved(rest, pool)
        self._carry: Tensor | None = None

    @functools.cached_property
    def _flat(self) -> Tensor:
        """[W*S], from the first gradients on: a model is made and cut without them."""
        bucket = self.bucket
        return torch.zeros(bucket.layout.padded_numel, dtype=self.dtype, device=bucket.full.device)

    @functools.cached_property
    def _views(self) -> Sequence[Tensor]:
        return self.bucket.split(self._flat)

    @functools.cached_property
    def local_views(self) -> Sequence[Tensor]:
        """See Gradients."""
        return self.bucket.split_numbers(self._flat)

    @functools.cached_property
    def result(self) -> Tensor:
        """See Gradients."""
        return self.bucket.own_slice(self._flat) if self._delivers_shard else self._flat

    @functools.cached_property
    def _resident(self) -> Rest:
        return InMemory(self.result)

    @property
    def shown(self) -> Sequence[Tensor]:
        """See Gradients."""
        return self._views if self.is_reduced and self._is_shown else ()

    @property
    def failure(self) -> TierError | None:
        """See Gradients."""
        return self._moved.failure if self._moved is not None else None

    @property
    def nbytes(self) -> int:
        """See Gradients."""
        moved = self._moved.nbytes if self._moved is not None else 0
        return moved + (self._flat.nbytes if "_flat" in vars(self) else 0)

    def sums(self) -> Sequence[Tensor]:
        """See Gradients."""
        return self._views if self.has_local else ()

    def lay_down(self) -> None:
        """See Gradients."""
        if self.is_reduced:
            self._reopen()
        if not self.has_local:  # the last reduction left whatever it liked beside its result
            self._flat[self.bucket.layout.numel :].zero_()
        self.arrivals.lay_into(self._views, adds=self.has_local)
        self.has_local = True

    def _reopen(self) -> None:
        """A backward after the reduction. A slice is put aside, and added back when this one is reduced; what every rank has
        whole stays: it goes through the reduction once more, and comes out as it was."""
        self.is_reduced = False
        self.has_local = not self._delivers_shard
        if self._delivers_shard:
            self._carry = self.result.clone()
        elif self.reduction.share != 1.0:
            self._flat.mul_(self.reduction.share)

    def start_reduce(self) -> Pending:
        """See Gradients."""
        reduction = self.reduction
        wire = reduction.to_wire(self._flat)
        if self._delivers_shard:
            return reduction.exchange.start_reduce_scatter(
                wire, self.result, divide_by=reduction.divide_by, accumulate=False
            )
        if reduction.num_ranks > 1:  # one rank knows by itself, and nobody would take the flag out of the norm
            wire[-1:].fill_(float(self.arrivals.misses_any))
        pending = reduction.exchange.start_all_reduce(wire, divide_by=reduction.divide_by)
        if wire is not self._flat:
            pending.wait()
            self._flat.copy_(wire)
        return pending

    def finish_reduce(self) -> None:
        """See Gradients."""
        if self._carry is not None:
            self.result.add_(self._carry)
            self._carry = None
        self.keep_local()

    def keep_local(self) -> None:
        """See Gradients."""
        self.is_reduced, self.has_local = True, False

    def settle(self) -> None:
        """See Gradients."""
        if not self.is_reduced:
            self.result.zero_()
            self.is_reduced = True
        if self.reduction.when is not When.NEVER:
            self.reduction.average_replicas(self.result)
        if self._moved is not None:
            self.replace(self.result)

    def take_missed_flag(self) -> Tensor | None:
        """See Gradients. It travels in the padding's last element, which is zero again after it."""
        if self._delivers_shard or self.reduction.num_ranks == 1 or self.reduction.when is When.NEVER:
            return None
        flag = self._flat[-1:].clone()
        self._flat[-1:].zero_()
        return flag

    def norm(self) -> Tensor:
        """See Gradients."""
        return norm_of(self.result)

    def rest(self) -> Rest:
        """See Gradients."""
        return self._moved.rest if self._moved is not None else self._resident

    def values(self) -> Tensor:
        """See Gradients. The reduction's memory still has them."""
        return self.result

    def replace(self, values: Tensor) -> None:
        """See Gradients."""
        if self._moved is not None:
            self._moved.put(values)
            self._moved.wait()

    def drop(self) -> None:
        """See Gradients."""
        if self._moved is not None:
            self._moved.forget()
        self.arrivals.forget()
        self.arrivals.end_step()
        self.is_reduced = self.has_local = False
        self._carry = None


class _Loan:
    """The flat buffer that a bucket borrows from the pool, from its first gradients to their reduction."""

    def __init__(self, bucket: Bucket, dtype: torch.dtype, pool: FlatPool) -> None:
        self._bucket, self._dtype, self._pool = bucket, dtype, pool
        self.buffer: FlatBuffer | None = None

    def lay_down(self, arrivals: Arrivals) -> None:
        """Lay arrivals into the buffer, borrowing it first."""
        adds = self.buffer is not None
        if self.buffer is None:
            layout = self._bucket.layout
            self.buffer = self._pool.take(layout.padded_numel, self._dtype, self._bucket.full.device)
            self.buffer.flat[layout.numel :].zero_()
        arrivals.lay_into(self.buffer.views_of(self._bucket), adds)

    def sums(self) -> Sequence[Tensor]:
        """See Gradients."""
        return self.buffer.views_of(self._bucket) if self.buffer is not None else ()

    def hand_over(self) -> FlatBuffer:
        """The buffer, which belongs to a reduction now; the next backward takes another."""
        buffer, self.buffer = self.buffer, None
        assert buffer is not None, "nothing was laid down"
        return buffer

    def give_back(self) -> None:
        """End the loan, if there is one."""
        if self.buffer is not None:
            self._pool.give_back(self.hand_over())


@final
class SlicedGradients:
    """Each backward's are scattered into this rank's slice, where they add up."""

    is_whole = False
    shown: Sequence[Tensor] = ()
    local_views: Sequence[Tensor] = ()
    failure: TierError | None = None

    def __init__(self, bucket: Bucket, reduction: Reduction, dtype: torch.dtype, pool: FlatPool) -> None:
        self.bucket, self.reduction, self.dtype = bucket, reduction, dtype
        self.arrivals = Arrivals(len(bucket.params))
        self.is_reduced = False
        self._pool = pool
        self._loan = _Loan(bucket, dtype, pool)
        self._on_wire: deque[FlatBuffer] = deque()

    @functools.cached_property
    def result(self) -> Tensor:
        """See Gradients. [S], from the first reduction on."""
        return torch.zeros(self.bucket.layout.shard_numel, dtype=self.dtype, device=self.bucket.full.device)

    @functools.cached_property
    def _resident(self) -> Rest:
        return InMemory(self.result)

    @property
    def has_local(self) -> bool:
        """See Gradients."""
        return self._loan.buffer is not None

    @property
    def nbytes(self) -> int:
        """See Gradients."""
        return self.result.nbytes if "result" in vars(self) else 0

    def sums(self) -> Sequence[Tensor]:
        """See Gradients."""
        return self._loan.sums()

    def lay_down(self) -> None:
        """See Gradients."""
        self._loan.lay_down(self.arrivals)

    def start_reduce(self) -> Pending:
        """See Gradients."""
        buffer = self._loan.hand_over()
        wire = self.reduction.to_wire(buffer.flat)
        self._on_wire.append(buffer)
        accumulate, self.is_reduced = self.is_reduced, True
        return self.reduction.exchange.start_reduce_scatter(
            wire, self.result, divide_by=self.reduction.divide_by, accumulate=accumulate
        )

    def finish_reduce(self) -> None:
        """See Gradients."""
        self._pool.give_back(self._on_wire.popleft())

    def keep_local(self) -> None:
        """See Gradients."""
        raise AssertionError("a slice holds reduced gradients only")

    def settle(self) -> None:
        """See Gradients."""
        if not self.is_reduced:
            self.result.zero_()
            self.is_reduced = True
        self.reduction.average_replicas(self.result)

    def take_missed_flag(self) -> Tensor | None:
        """See Gradients."""
        return None

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

    def drop(self) -> None:
        """See Gradients."""
        self._loan.give_back()
        self.arrivals.forget()
        self.arrivals.end_step()
        self.is_reduced = False


class _Landing(NamedTuple):
    """A reduction on the wire: the borrowed buffer it reads, and where its result goes (the buffer's own slice, or memory of
    its own where it is added to what is at rest)."""

    buffer: FlatBuffer
    into: Tensor


@final
class TieredGradients:
    """Each backward's are scattered, and this rank's slice moves to its rest as it arrives, while backward goes on."""

    is_whole = False
    shown: Sequence[Tensor] = ()
    local_views: Sequence[Tensor] = ()

    def __init__(self, bucket: Bucket, reduction: Reduction, dtype: torch.dtype, pool: FlatPool, rest: Rest) -> None:
        self.bucket, self.reduction, self.dtype = bucket, reduction, dtype
        self.arrivals = Arrivals(len(bucket.params))
        self.is_reduced = False
        self.result = torch.empty(0, dtype=dtype, device=bucket.full.device)
        self._moved = Moved(rest, pool)
        self._loan = _Loan(bucket, dtype, pool)
        self._on_wire: deque[_Landing] = deque()

    @property
    def has_local(self) -> bool:
        """See Gradients."""
        return self._loan.buffer is not None

    @property
    def failure(self) -> TierError | None:
        """See Gradients."""
        return self._moved.failure

    @property
    def nbytes(self) -> int:
        """See Gradients."""
        return self._moved.nbytes

    def sums(self) -> Sequence[Tensor]:
        """See Gradients."""
        return self._loan.sums()

    def lay_down(self) -> None:
        """See Gradients."""
        self._loan.lay_down(self.arrivals)

    def start_reduce(self) -> Pending:
        """See Gradients."""
        buffer = self._loan.hand_over()
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

    def keep_local(self) -> None:
        """See Gradients."""
        raise AssertionError("what rests on a tier holds reduced gradients only")

    def settle(self) -> None:
        """See Gradients."""
        if not self.is_reduced:
            self.is_reduced = True
            self.replace(self._slice().zero_())
        if self.reduction.replicas is not None:
            values = self.values()
            self.reduction.average_replicas(values)
            self.replace(values)
        self._moved.wait()

    def take_missed_flag(self) -> Tensor | None:
        """See Gradients."""
        return None

    def norm(self) -> Tensor:
        """See Gradients. Taken when they were last put to rest."""
        assert self._moved.norm is not None, "asked after `settle`"
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
        self.arrivals.forget()
        self.arrivals.end_step()
        self._loan.give_back()
        self.is_reduced = False
