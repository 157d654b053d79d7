"""The gradients of one bucket, from their arrival to their placement: laid into a flat buffer, reduced, delivered.

Made by `gradients_of_bucket`, one per trained bucket; driven by `zero.reduce`, which decides when; read by the optimizer. How a
bucket is reduced is a row, `zero.reduction.Reduction`. Where gradients live is one of three classes behind `Gradients`:

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

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from deepspeed.comm.exchange import Pending
from deepspeed.tiers import Rest
from deepspeed.utils.errors import TierError
from deepspeed.zero.arrivals import Arrivals
from deepspeed.zero.bucket import Bucket
from deepspeed.zero.pool import FlatPool
from deepspeed.zero.reduction import Reduction, When
from deepspeed.zero.sliced_gradients import SlicedGradients, TieredGradients
from deepspeed.zero.whole_gradients import WholeGradients


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

    def complete(self) -> None:
        """At the boundary: average with the replicas, and have the gradients complete and at rest. Collective."""

    def take_missed_flag(self) -> Tensor | None:
        """[1], above 0 if any rank missed a gradient, where the reduction brought that along; None where it did not. Call
        once after the reduction, before the norm."""

    def norm(self) -> Tensor:
        """2-norm of this step's reduced gradients on this rank, fp32."""

    def rest(self) -> Rest:
        """Where this step's reduced gradients are, after `complete`."""

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
