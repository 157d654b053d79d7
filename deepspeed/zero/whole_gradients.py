"""The gradients of a bucket that each rank has whole: they add up in a flat buffer of their own, and are reduced at the boundary.

Behind `zero.gradients.Gradients`, where what its methods mean is said. ZeRO stages 0 and 1, and one rank alone: flat [W*S] is
reduced into itself where the optimizer reads all of it, else into this rank's slice of itself, and brought to rest from there.

Invariant: between `start_reduce` and `finish_reduce` the flat buffer belongs to the wire.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from deepspeed.comm.exchange import Pending
from deepspeed.tiers import InMemory, Rest
from deepspeed.utils.errors import TierError
from deepspeed.zero.bucket import Bucket
from deepspeed.zero.delivery import Moved
from deepspeed.zero.gradients import Arrivals, FlatPool, norm_of
from deepspeed.zero.reduction import Reduction, When


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

    def complete(self) -> None:
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
