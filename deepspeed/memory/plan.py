"""The buckets an engine would make of a model: cut and laid out by ZeRO's own functions, without memory.

Called by the estimator with the trace's fake model. Follows `zero.build.build`: what that allocates is here a number.

Invariant: `plan_buckets` makes the same buckets, in the same order, as `build` (tested against real engines).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from deepspeed.zero.bucket import BucketState, LoadQueue
from deepspeed.zero.build import Limits, choose_units
from deepspeed.zero.cut import cut_by_size, users_of
from deepspeed.zero.layout import BucketLayout, group_neighbours
from deepspeed.zero.placing import Places, Placing


@dataclass(frozen=True)
class _Ranks:
    """Stands for a process group: the gatherer asks how many ranks there are."""

    world_size: int


class PlannedBucket:
    """A bucket's sizes and state; what `zero.gather.Gatherer` drives. `on_change(bucket)` hears of unshard and reshard."""

    def __init__(
        self,
        index: int,
        params: Sequence[nn.Parameter],
        layout: BucketLayout,
        places: Places,
        *,
        is_sharded: bool,
        trains: bool,
        keeps_storage: bool,
    ) -> None:
        self.index = index
        self.params = list(params)
        self.layout = layout
        self.places = places
        self.is_sharded = is_sharded
        self.trains = trains
        self.loads = LoadQueue()
        self.requires_grad = any(param.requires_grad for param in params)
        self.exchange = _Ranks(layout.world_size)
        self.state = BucketState.SHARDED if is_sharded else BucketState.UNSHARDED
        self.holders = 0
        self.keeps_storage = self.has_storage = keeps_storage

    def hold(self) -> None:
        """See Bucket."""
        self.holders += 1

    def let_go(self) -> None:
        """See Bucket."""
        self.holders -= 1

    def regather(self) -> None:
        """See Bucket."""
        if not self.keeps_storage and not self.has_storage:
            self.has_storage = True
            self.on_storage(1)
        if self.state is BucketState.SHARDED:
            self.state = BucketState.GATHERING

    def finish_unshard(self) -> None:
        """See Bucket."""
        if self.state is BucketState.GATHERING:
            self.state = BucketState.UNSHARDED

    def reshard(self) -> None:
        """See Bucket."""
        if self.is_sharded and self.state is not BucketState.SHARDED:
            if not self.keeps_storage and self.has_storage:
                self.has_storage = False
                self.on_storage(-1)
            self.state = BucketState.SHARDED

    def on_storage(self, count: int) -> None:
        """The full buffer's storage comes (1) or goes (-1); replaced by the replay."""


@dataclass
class Plan:
    """All buckets of a model, which of them are sharded, which modules use those, and what lies outside of buckets."""

    buckets: list[PlannedBucket] = field(default_factory=list)
    users: dict[nn.Module, list[PlannedBucket]] = field(default_factory=dict)
    loose: list[nn.Parameter] = field(default_factory=list)

    @property
    def sharded(self) -> list[PlannedBucket]:
        """The buckets that the gatherer drives."""
        return [bucket for bucket in self.buckets if bucket.is_sharded]

    @property
    def trained(self) -> list[PlannedBucket]:
        """The buckets that have gradients and optimizer state."""
        return [bucket for bucket in self.buckets if bucket.trains]


def plan_buckets(
    model: nn.Module, group_of: Mapping[nn.Parameter, int], placing: Placing, limits: Limits, shard_size: int
) -> Plan:
    """The buckets of `model` on each of `shard_size` ranks. `group_of` gives each optimized parameter its group."""
    policy = placing.policy
    plan = Plan()
    named = {param: name for name, param in model.named_parameters()}
    plan.loose = [param for param in named if not param.is_floating_point()]
    for param in plan.loose:
        del named[param]
    trained = {param for param in named if param.requires_grad and param in group_of}

    def make(params: Sequence[nn.Parameter], is_sharded: bool) -> PlannedBucket:
        trains = params[0] in trained
        groups = [group_of[param] if trains else -1 for param in params]
        order = group_neighbours(groups)
        layout = BucketLayout(tuple(params[i].numel() for i in order), tuple(groups[i] for i in order), shard_size)
        index = len(plan.sharded) if is_sharded else -1
        places = placing.decide(layout.shard_numel, is_sharded=is_sharded, trains=trains)
        bucket = PlannedBucket(
            index,
            [params[i] for i in order],
            layout,
            places,
            is_sharded=is_sharded,
            trains=trains,
            keeps_storage=not is_sharded or (shard_size == 1 and not placing.is_apart(places.params)),
        )
        plan.buckets.append(bucket)
        return bucket

    def by_size(params: Sequence[nn.Parameter]) -> None:
        backwards = list(params)[::-1]
        for chunk in cut_by_size([param.numel() for param in backwards], limits.bucket_numel):
            make([backwards[i] for i in chunk], False)

    if not policy.parameters.is_sharded:
        by_size([param for param in named if param in trained])
        plan.loose += [param for param in named if param not in trained]
        return plan
    resident, units = choose_units(model, named, limits)
    by_size([param for param in resident if param in trained])
    by_size([param for param in resident if param not in trained])
    of_unit: list[list[PlannedBucket]] = []
    for unit in units:
        params = [param for _, param in unit.params]
        kinds = ([p for p in params if p in trained], [p for p in params if p not in trained])
        of_unit.append([make(kind, True) for kind in kinds if kind])
    for user, indices in users_of(model, units).items():
        plan.users[user] = [bucket for i in indices for bucket in of_unit[i]]
    return plan
