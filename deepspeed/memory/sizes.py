"""Buckets without memory: the plan's (`zero.plan`), with the states that a gatherer moves them through.

Made by `memory.replay` of the plan that an engine would execute; driven by the real `zero.gather.Gatherer`, to which they
are `Gatherable`s like any bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from deepspeed.zero.bucket import BucketState
from deepspeed.zero.loads import LoadQueue
from deepspeed.zero.placing import Placing
from deepspeed.zero.plan import BucketPlan, ModelPlan


@dataclass(frozen=True)
class _Ranks:
    """Stands for a process group: the gatherer asks how many ranks there are."""

    world_size: int


class SizedBucket:
    """A bucket's sizes and state. `on_storage(1)` hears that its full buffer's storage comes, `on_storage(-1)` that it
    goes."""

    def __init__(
        self, index: int, plan: BucketPlan, placing: Placing, on_storage: Callable[[SizedBucket, int], None]
    ) -> None:
        self.index, self.plan = index, plan
        self.params, self.layout, self.places = plan.params, plan.layout, plan.places
        self.is_sharded, self.trains = plan.is_sharded, plan.trains
        self.loads = LoadQueue()
        self.requires_grad = any(param.requires_grad for param in plan.params)
        self.exchange = _Ranks(plan.layout.world_size)
        self.state = BucketState.SHARDED if plan.is_sharded else BucketState.UNSHARDED
        self.holders = 0
        is_whole = plan.layout.world_size == 1 and not placing.is_apart(plan.places.params)
        self.keeps_storage = self._has_storage = not plan.is_sharded or is_whole
        self._on_storage = on_storage

    def hold(self, params: Sequence[nn.Parameter] | None = None) -> None:
        """See Bucket."""
        self.holders += 1

    def unhold(self, params: Sequence[nn.Parameter] | None = None) -> None:
        """See Bucket."""
        self.holders -= 1

    def regather(self) -> None:
        """See Bucket."""
        self._set_storage(True)
        if self.state is BucketState.SHARDED:
            self.state = BucketState.GATHERING

    def finish_unshard(self) -> None:
        """See Bucket."""
        if self.state is BucketState.GATHERING:
            self.state = BucketState.UNSHARDED

    def reshard(self, *, keeps_written: bool = False) -> None:
        """See Bucket."""
        if self.is_sharded and self.state is not BucketState.SHARDED:
            self._set_storage(False)
            self.state = BucketState.SHARDED

    def _set_storage(self, is_there: bool) -> None:
        if not self.keeps_storage and self._has_storage is not is_there:
            self._has_storage = is_there
            self._on_storage(self, 1 if is_there else -1)


@dataclass
class Sizes:
    """A plan's buckets, which modules use the sharded ones, and what lies outside of buckets."""

    buckets: list[SizedBucket] = field(default_factory=list)
    users: dict[nn.Module, list[SizedBucket]] = field(default_factory=dict)
    loose: list[nn.Parameter] = field(default_factory=list)

    @property
    def sharded(self) -> list[SizedBucket]:
        """The buckets that the gatherer drives."""
        return [bucket for bucket in self.buckets if bucket.is_sharded]

    @property
    def trained(self) -> list[SizedBucket]:
        """The buckets that have gradients and optimizer state."""
        return [bucket for bucket in self.buckets if bucket.trains]


def sizes_of(plan: ModelPlan, placing: Placing, on_storage: Callable[[SizedBucket, int], None]) -> Sizes:
    """The buckets of a plan, all sharded that can be, as after `zero.build`."""
    sizes = Sizes(loose=[param for param, _ in plan.loose])
    for planned in plan.buckets:
        index = len(sizes.sharded) if planned.is_sharded else -1
        sizes.buckets.append(SizedBucket(index, planned, placing, on_storage))
    sizes.users = {module: [sizes.buckets[i] for i in used] for module, used in plan.users.items()}
    return sizes
