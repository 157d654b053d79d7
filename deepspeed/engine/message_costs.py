"""Seconds that one more message costs a step here, besides its bytes: a bucket laid down, launched, waited for, and the other ranks' turn.

Called by the autotuner's first run (`probe`), in all ranks at once. Two engines on the same small stack that differ in how many messages
carry its parameters differ by what messages cost: hooks, launches, the wire's latency, and ranks that wake each other up. No constant stands
for any of it. How many messages either sends is the estimator's count. Steps of all engines take turns; the fastest of each counts.

    a sum     an all-reduced bucket                                     ZeRO 0: many buckets, one bucket
    a pair    a reduce-scatter and an all-gather, half of which each    ZeRO 1

ZeRO 3 gathers at least a million elements at once (`zero.plan.MIN_UNIT_NUMEL`): there bytes count.

Invariant: collective over all ranks; no engine is left, and what is random goes on as it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspeed.memory.estimator import Estimator

NUM_LAYERS, WIDTH = 12, 256
SAMPLES = 128
"""So many that ranks compute between messages, as they do in a model's backward: who waits there is woken on a busy core."""
NUM_TURNS = 16
ENOUGH_S = 3.0
"""After so long no other turn begins."""
NUM_WARM = 3
SMALL = {"reduce_bucket_size": WIDTH * WIDTH}


class _Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_LAYERS)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


def message_costs(make_engine: Callable[..., Any]) -> dict[str, float]:
    """Fields of `profiling.rates.Rates` by name; none where one rank is alone. Collective over all ranks.

    make_engine: of `model` and `config` by name, a DeepSpeedEngine.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return {}
    with torch.random.fork_rng():
        return {"sum_message_s": _each(make_engine, {"stage": 0}), "message_s": _each(make_engine, {"stage": 1})}


def _each(make_engine: Callable[..., Any], section: Mapping[str, Any]) -> float:
    """Of a message: the difference of two steps over that of their messages."""
    x = torch.ones(SAMPLES, WIDTH)
    configs = [
        {"train_micro_batch_size_per_gpu": SAMPLES, "optimizer": {"type": "AdamW"}, "zero_optimization": zero}
        for zero in ({**section, **SMALL}, {**section})
    ]
    estimator = Estimator(_Stack(), x)
    sent = [estimator.estimate(config, world_size=dist.get_world_size(), bounds=False).messages for config in configs]
    many, few = (sum(op.calls for op in ops.values()) for ops in sent)
    engines = [make_engine(model=_Stack(), config=config) for config in configs]
    times = _fastest(engines, x)
    for engine in engines:
        engine.destroy()
    return max(0.0, times[0] - times[1]) / max(1, many - few)


def _fastest(engines: Sequence[Any], x: Tensor) -> list[float]:
    """Seconds of each one's step, of the slowest rank."""
    times = [float("inf")] * len(engines)
    began_s = time.perf_counter()
    for turn in range(NUM_WARM + NUM_TURNS):
        passed_s = torch.tensor(time.perf_counter() - began_s)
        dist.all_reduce(passed_s, op=dist.ReduceOp.MAX)  # all end with the same turn
        if turn > NUM_WARM and passed_s > ENOUGH_S:
            break
        for i, engine in enumerate(engines):
            dist.barrier()
            start_s = time.perf_counter()
            engine.backward(engine(x))
            engine.step()
            times[i] = min(times[i], time.perf_counter() - start_s) if turn >= NUM_WARM else times[i]
    slowest = torch.tensor(times, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.tolist()
