"""The optimizer-side weights of one bucket, and which runs of them the optimizer steps.

Made by `zero.build`, one per trained bucket; stepped by `zero.optimizer` (in memory) or `zero.stream` (on a tier).
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepspeed.tiers import InMemory, Rest, Tier
from deepspeed.zero.bucket import Bucket
from deepspeed.zero.layout import BucketLayout, RunSpan
from deepspeed.zero.placing import Places, Placing
from deepspeed.zero.policy import ZeroPolicy

FOLLOW_NUMEL = 1 << 22
"""Elements that are compared at once where masters follow written parameters."""


class Master:
    """One bucket's masters: `weights` [S] (or [W*S] where O is replicated) at rest, and their spans by group.

    `source` is the bucket's flat fp32 values before they were cast down, where they were. The bucket is whole.
    """

    def __init__(self, bucket: Bucket, policy: ZeroPolicy, source: Tensor | None, places: Places, placing: Placing):
        self.bucket = bucket
        self.is_sharded = policy.optimizer.is_sharded
        self.is_alias = places.is_alias
        self.tier = places.optimizer
        values = bucket.full if source is None else source
        values = bucket.own_slice(values) if self.is_sharded else values
        self.weights: Rest
        if self.is_alias:
            self.weights = bucket.rest if self.is_sharded else InMemory(bucket.full)
        elif self.tier is Tier.DEVICE:
            # A copy even in the same dtype: the bucket's memory goes when its parameters rest on a tier.
            self.weights = InMemory(values.to(policy.optimizer.dtype, copy=True))
        else:
            self.weights = placing.optimizer(self.tier, "master", values.numel(), policy.optimizer.dtype)
            self.weights.start_store(0, values.to(policy.optimizer.dtype)).wait()
        layout, rank = bucket.layout, bucket.exchange.rank
        if not self.is_sharded:
            layout, rank = BucketLayout(layout.numels, layout.groups, 1), 0
        self.layout, self.rank = layout, rank
        self.spans: tuple[RunSpan, ...] = layout.runs(rank)

    @property
    def numel(self) -> int:
        """Elements of masters on this rank, padding included."""
        return self.weights.numel

    @property
    def is_streamed(self) -> bool:
        """Whether masters rest on a tier below the device, and the step streams through them."""
        return self.tier is not Tier.DEVICE

    @property
    def tensor(self) -> Tensor:
        """The masters, 1-D: the bytes themselves in memory, on the nvme tier a copy read now."""
        return read(self.weights, 0, self.numel)

    def whole_params(self) -> list[tuple[int, Tensor]]:
        """(group, tensor in full shape) per parameter; only where O is replicated."""
        return list(zip(self.bucket.layout.groups, self.bucket.split_numbers(self.tensor), strict=True))

    def to_params(self) -> None:
        """Write the parameters' own slice from the master."""
        if not self.is_alias:
            target = self.bucket.rest if self.is_sharded else InMemory(self.bucket.full)
            target.start_store(0, self.tensor.to(target.dtype)).wait()

    def follow_memory(self) -> None:
        """The bucket has other memory; masters that are the parameters are there now."""
        if self.is_alias and not self.is_sharded:
            self.weights = InMemory(self.bucket.full)

    @property
    def can_be_written(self) -> bool:
        """Whether the parameters lie in memory, where a script may write them, and are other bytes than the masters."""
        return not self.is_alias and self.bucket.keeps_storage

    def low(self) -> Tensor:
        """The parameters that these masters stand for, 1-D, as the model has them."""
        return self.bucket.own_slice(self.bucket.full) if self.is_sharded else self.bucket.full

    @property
    def may_lag(self) -> bool:
        """Whether parameters may have been written since the masters were last asked to follow them."""
        return (self.can_be_written or self.bucket.written.is_in_shard) and not self.bucket.is_away

    @torch.no_grad()
    def follow_params(self, first: int = 0, stop: int | None = None) -> None:
        """Take over what was written into the parameters, of `first` to `stop` (all): elements that are not their master, rounded,
        any more. The other masters keep what rounding took from the parameters."""
        if self.is_alias:
            return
        low, stop = self.low() if self.bucket.keeps_storage else self.bucket.shard, self.numel if stop is None else stop
        for start in range(first, stop, FOLLOW_NUMEL):
            master = read(self.weights, start, min(start + FOLLOW_NUMEL, stop))
            written = low[start : start + master.numel()].to(master.device)
            is_written = master.to(written.dtype) != written
            if is_written.any():
                self.weights.start_store(start, torch.where(is_written, written.to(master.dtype), master)).wait()

    def from_params(self) -> None:
        """Take the master from the parameters' own slice, after those were changed from outside."""
        if not self.is_alias:
            values = self.bucket.shard if self.is_sharded else self.bucket.full
            self.weights.start_store(0, values.to(self.weights.dtype)).wait()


def read(rest: Rest, start: int, stop: int) -> Tensor:
    """Elements of a rest: a view where they are in memory, else a copy in main memory."""
    view = rest.view(start, stop)
    if view is None:
        view = torch.empty(stop - start, dtype=rest.dtype)
        rest.start_load(start, view).wait()
    return view


def gradient_rest(placing: Placing, master: Master) -> Rest | None:
    """Where a bucket's reduced gradients rest: with its optimizer state; None for the device's memory."""
    if not placing.is_apart(master.tier):
        return None
    return placing.optimizer(master.tier, "gradient", master.numel, placing.policy.gradients.dtype)
