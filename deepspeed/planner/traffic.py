"""What a rank's ZeRO sends in one step of a data-parallel run, to the byte: the engine's plan played without an engine. Pure.

The same messages that `comm.observe` counts in a run: full buffers over all ranks, by operation. Reductions
follow from the plan of buckets; gathers at ZeRO stage 3 from the real gatherer, driven by the model's traced step.

Invariant: equal to the engine's counts of a step from the fourth on, when the order of use is known (`tests/planner/test_traffic.py`).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from deepspeed.config import load_config
from deepspeed.memory.estimator import Estimator
from deepspeed.memory.replay import Replay
from deepspeed.memory.sizes import SizedBucket

GATHER, SCATTER, ALL_REDUCE = "zero.all_gather", "zero.reduce_scatter", "zero.all_reduce"


def step_traffic(
    model: nn.Module, config: Any, batch: Any, *, world_size: int, device_type: str = "cpu"
) -> dict[str, int]:
    """Message bytes of one optimizer step by operation. Arguments as of `memory.estimate`."""
    if world_size == 1:
        return {}
    config = load_config(config)
    estimator = Estimator(model, batch, device_type=device_type)
    made = estimator.engine(config, world_size=world_size)
    counting = _Counting(made.trace, made.plan, made.settings)
    counting.run()
    return counting.traffic()


class _Counting(Replay):
    """A replay that counts gathers."""

    def __init__(self, *args: Any) -> None:
        self._gathered: Counter[SizedBucket] = Counter()
        super().__init__(*args)

    def _count_storage(self, bucket: SizedBucket, count: int) -> None:
        super()._count_storage(bucket, count)
        if count > 0:
            self._gathered[bucket] += 1

    def _step(self) -> None:
        self._of_step, self._gathered = self._gathered, Counter()
        super()._step()

    def traffic(self) -> dict[str, int]:
        """Of the last step that was played."""
        policy, settings = self.settings.policy, self.settings
        found: Counter[str] = Counter()
        param, wire = policy.parameters.dtype.itemsize, settings.wire_dtype.itemsize
        micros = settings.accumulation if policy.gradients.is_sharded else 1
        played = min(2, settings.accumulation)  # micro-batches that a replay plays stand for all
        for bucket in self.sizes.buckets:
            nbytes = bucket.layout.padded_numel
            if bucket.trains:
                op = SCATTER if policy.optimizer.is_sharded else ALL_REDUCE
                found[op] += nbytes * wire * micros
                if policy.optimizer.is_sharded and not bucket.is_sharded:
                    found[GATHER] += nbytes * param
            if bucket.is_sharded and not bucket.keeps_storage:
                found[GATHER] += nbytes * param * self._of_step[bucket] * settings.accumulation // played
        return {op: count for op, count in found.items() if count}
