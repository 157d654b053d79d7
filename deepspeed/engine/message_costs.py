"""Seconds that one more message costs a step here, besides its bytes: a bucket laid down, launched, waited for, and the other ranks' turn; and
those of an update.

Called by the autotuner's first run (`probe`), in all ranks at once. Two engines on the same small stack that differ in how many messages
carry its parameters differ by what messages cost: hooks, launches, the wire's latency, and ranks that wake each other up. No constant stands
for any of it. How many messages either sends is the estimator's count. Steps of all engines take turns; the median of their differences counts, since ranks
that stand still for each other wait for whoever was disturbed.

    a sum     an all-reduced bucket                                     ZeRO 0: many buckets, one bucket
    a pair    a reduce-scatter and an all-gather, half of which each    ZeRO 1

    an unshard   an all-gather around its use, prefetched or not    ZeRO 3: sharded, as at ZeRO 2
    shared       a sum that layers stand still for                  products alone, and with a sum between

    an update    whatever it updates, and each parameter more       ZeRO 0: few parameters, many, all of them small

Invariant: collective over all ranks; no engine is left, and what is random goes on as it was.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspeed.memory.estimator import Estimate, Estimator
from deepspeed.memory.messages import GATHER
from deepspeed.profiling.rates import Rates

NUM_LAYERS, WIDTH = 12, 256
SAMPLES = 128
"""So many that ranks compute between messages, as they do in a model's backward: who waits there is woken on a busy core."""
PRODUCTS = 6
"""Between two sums: about as long as a layer of a small model computes."""
NUM_TURNS = 16
ENOUGH_S = 2.0
"""After so long no other turn begins."""
NUM_WARM = 3
FEW, MANY, NARROW = 12, 108, 32
"""Parameters whose update is all overhead, and their width."""
SMALL = {"reduce_bucket_size": WIDTH * WIDTH}
SHARDED = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
"""Gathered in forward, and again in backward."""


class _Stack(nn.Module):
    def __init__(self, layers: int = NUM_LAYERS, width: int = WIDTH) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


def message_costs(make_engine: Callable[..., Any], rates: Rates) -> dict[str, float]:
    """Fields of `profiling.rates.Rates` by name; where one rank is alone, the update's only. Collective over all ranks.

    make_engine: of `model` and `config` by name, a DeepSpeedEngine. rates: what bytes cost here.
    """
    with torch.random.fork_rng():
        updates = _updates(make_engine)
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return updates
        found = {
            **updates,
            "sum_message_s": _each(make_engine, {"stage": 0}),
            "message_s": _each(make_engine, {"stage": 1}),
        }
        unshards = _unshards(make_engine, rates, found["message_s"])
        return {**found, **unshards, "shared_message_s": _shared(rates)}


def _each(make_engine: Callable[..., Any], section: Mapping[str, Any]) -> float:
    """Of a message: the difference of two steps over that of their messages."""
    zeros = [{**section, **SMALL}, {**section}]
    many, few = (sum(op.calls for op in estimate.messages.values()) for estimate in _estimates(zeros))
    return _differences(make_engine, zeros)[0] / max(1, many - few)


def _unshards(make_engine: Callable[..., Any], rates: Rates, message_s: float) -> dict[str, float]:
    """Of a gather around a module, prefetched and not, beside ZeRO 3 whose parameters are small enough to stay."""
    zeros = [SHARDED, {**SHARDED, "stage3_prefetch_bucket_size": 0}, {"stage": 3}]
    early, _, kept = _estimates(zeros)
    size = dist.get_world_size()
    more = early.messages[GATHER].nbytes - kept.messages[GATHER].nbytes
    bytes_s = more * (size - 1) / size / max(rates.wire_nbytes_s, 1.0)
    saved_s = kept.messages[GATHER].calls * message_s
    prices = [max(0.0, (s + saved_s - bytes_s) / max(1, early.unshards)) for s in _differences(make_engine, zeros)]
    return dict(zip(("unshard_s", "unshard_late_s"), prices, strict=True))


def _estimates(zeros: Sequence[Mapping[str, Any]]) -> list[Estimate]:
    estimator = Estimator(_Stack(), torch.ones(SAMPLES, WIDTH))
    return [estimator.estimate(_config(zero), world_size=dist.get_world_size(), bounds=False) for zero in zeros]


def _config(zero: Mapping[str, Any]) -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": SAMPLES, "optimizer": {"type": "AdamW"}, "zero_optimization": {**zero}}


def _differences(make_engine: Callable[..., Any], zeros: Sequence[Mapping[str, Any]]) -> list[float]:
    """Seconds by which a step of each but the last is longer than the last one's."""
    engines = [make_engine(model=_Stack(), config=_config(zero)) for zero in zeros]
    x = torch.ones(SAMPLES, WIDTH)

    def step(engine: Any) -> None:
        engine.backward(engine(x))
        engine.step()

    found = _longer([lambda engine=engine: step(engine) for engine in engines])  # type: ignore[misc]
    for engine in engines:
        engine.destroy()
    return found


def _updates(make_engine: Callable[..., Any]) -> dict[str, float]:
    """Of an update besides its bytes, and of each parameter of it."""
    x = torch.ones(1, NARROW)
    engines = [make_engine(model=_Stack(layers, NARROW), config=_config({"stage": 0})) for layers in (FEW, MANY)]

    def update_s(engine: Any) -> float:
        engine.backward(engine(x))
        _meet()
        start_s = time.perf_counter()
        engine.step()
        return time.perf_counter() - start_s

    turns = _slowest([[update_s(engine) for engine in engines] for _ in range(NUM_WARM + NUM_TURNS)][NUM_WARM:])
    few_s, many_s = (statistics.median(column) for column in zip(*turns, strict=True))
    for engine in engines:
        engine.destroy()
    each_s = max(0.0, many_s - few_s) / (MANY - FEW)
    return {"update_s": max(0.0, few_s - FEW * each_s), "update_param_s": each_s}


def _meet() -> None:
    if dist.is_initialized():
        dist.barrier()


def _slowest(turns: list[list[float]]) -> list[list[float]]:
    """Seconds of the slowest rank."""
    slowest = torch.tensor(turns, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.tolist()


def _shared(rates: Rates) -> float:
    """Of a sum between products: what it costs besides its bytes."""
    stack, x, sent = _Stack(), torch.ones(SAMPLES, WIDTH), torch.ones(SAMPLES, WIDTH)

    def run(sums: bool) -> None:
        with torch.no_grad():
            for layer in stack.layers:
                for _ in range(PRODUCTS):
                    layer(x)
                if sums:
                    dist.all_reduce(sent)

    size = dist.get_world_size()
    bytes_s = 2 * sent.nbytes * (size - 1) / size / max(rates.sum_nbytes_s or rates.wire_nbytes_s, 1.0)
    (longer_s,) = _longer([lambda: run(True), lambda: run(False)])
    return max(0.0, longer_s / NUM_LAYERS - bytes_s)


def _longer(runs: Sequence[Callable[[], None]]) -> list[float]:
    """Seconds by which each but the last takes longer than the last, of the slowest rank: the median of their turns."""
    turns: list[list[float]] = []
    began_s = time.perf_counter()
    for turn in range(NUM_WARM + NUM_TURNS):
        passed_s = torch.tensor(time.perf_counter() - began_s)
        dist.all_reduce(passed_s, op=dist.ReduceOp.MAX)  # all end with the same turn
        if turn > NUM_WARM and passed_s > ENOUGH_S:
            break
        times = []
        for run in runs:
            dist.barrier()
            start_s = time.perf_counter()
            run()
            times.append(time.perf_counter() - start_s)
        if turn >= NUM_WARM:
            turns.append(times)
    rows = _slowest(turns)
    return [max(0.0, statistics.median(row[i] - row[-1] for row in rows)) for i in range(len(runs) - 1)]
