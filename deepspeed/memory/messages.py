"""What a rank sends in one step, to the byte: the engine's plan played without an engine. Pure.

The same messages that `comm.observe` counts in a run: full buffers over all ranks, by operation. Reductions
follow from the plan of buckets; gathers at ZeRO stage 3 from the real gatherer, driven by the model's traced step. What layers send that ranks
share was told by the layers themselves while they were traced.
Made by `memory.estimator`, which plays every configuration anyway; `planner.cost` makes seconds of them.

Invariant: equal to the engine's counts of a step from the fourth on, when the order of use is known (`tests/planner/test_traffic.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from deepspeed.memory.replay import Replay
from deepspeed.memory.sizes import SizedBucket

GATHER, SCATTER, ALL_REDUCE = "zero.all_gather", "zero.reduce_scatter", "zero.all_reduce"


class Messages(NamedTuple):
    """Of one operation in a step."""

    calls: int
    nbytes: int

    def times(self, number: int) -> Messages:
        """So many times as many."""
        return Messages(number * self.calls, number * self.nbytes)


class Unshards(NamedTuple):
    """All-gathers of a step that modules stand still for."""

    calls: int = 0
    params: int = 0
    """That become whole in them, each as often as it does."""


NO_UNSHARDS = Unshards()


def summed(sent: Iterable[tuple[str, int]]) -> dict[str, Messages]:
    """Messages of (operation, bytes) each, by operation."""
    found: dict[str, Messages] = {}
    for op, nbytes in sent:
        before = found.get(op, Messages(0, 0))
        found[op] = Messages(before.calls + 1, before.nbytes + nbytes)
    return found


class CountingReplay(Replay):
    """A replay that counts messages."""

    def __init__(self, *args: Any) -> None:
        self._gathered: Counter[SizedBucket] = Counter()
        self._of_step: Counter[SizedBucket] = Counter()
        super().__init__(*args)

    def _count_storage(self, bucket: SizedBucket, count: int) -> None:
        super()._count_storage(bucket, count)
        if count > 0:
            self._gathered[bucket] += 1

    def _step(self) -> None:
        self._of_step, self._gathered = self._gathered, Counter()
        super()._step()

    def unshards(self) -> Unshards:
        """Gathers of parameters around their use, in the last step that was played."""
        played = min(2, self.settings.accumulation)
        sharded = [b for b in self.sizes.buckets if b.is_sharded and not b.keeps_storage and b.layout.world_size > 1]
        times = {b: self._of_step[b] * self.settings.accumulation // played for b in sharded}
        return Unshards(sum(times.values()), sum(num * len(b.params) for b, num in times.items()))

    def messages(self) -> dict[str, Messages]:
        """Of the last step that was played, by operation; none where one rank has all of it."""
        policy, settings = self.settings.policy, self.settings
        inside = [(each.op, each.nbytes) for each in self.trace.messages]
        found = {op: sent.times(settings.accumulation) for op, sent in summed(inside).items()}
        calls: Counter[str] = Counter()
        nbytes: Counter[str] = Counter()
        param, wire = policy.parameters.dtype.itemsize, settings.wire_dtype.itemsize
        micros = settings.accumulation if policy.gradients.is_sharded else 1
        played = min(2, settings.accumulation)  # micro-batches that a replay plays stand for all

        def add(op: str, num: int, itemsize: int, bucket: SizedBucket) -> None:
            calls[op] += num
            nbytes[op] += num * bucket.layout.padded_numel * itemsize

        for bucket in self.sizes.buckets:
            if bucket.layout.world_size * settings.num_replicas == 1:  # one rank has all of it, or these experts alone
                continue
            if bucket.trains:
                add(SCATTER if policy.optimizer.is_sharded else ALL_REDUCE, micros, wire, bucket)
                if policy.optimizer.is_sharded and not bucket.is_sharded:
                    add(GATHER, 1, param, bucket)
            if bucket.is_sharded and not bucket.keeps_storage:
                add(GATHER, self._of_step[bucket] * settings.accumulation // played, param, bucket)
        return found | {op: Messages(num, nbytes[op]) for op, num in calls.items() if num}
