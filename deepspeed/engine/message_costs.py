"""Seconds that one more message costs a step here, besides its bytes: a bucket laid down, launched, waited for, and the other ranks' turn; and
those of an update.

Called by the autotuner's first run (`probe`), in all ranks at once. Two engines on the same small stack that differ in how many messages
carry its parameters differ by what messages cost: hooks, launches, the wire's latency, and ranks that wake each other up. No constant stands
for any of it. How many messages either sends is the estimator's count. Steps of all engines take turns, and those that were hardly disturbed
count (`profiling.rates.undisturbed`), as in whatever else is measured.

    a sum     an all-reduced bucket                                     ZeRO 0: many buckets, one bucket
    a pair    a reduce-scatter and an all-gather, half of which each    ZeRO 1

    an unshard   an all-gather around its use, prefetched or not,   ZeRO 3: sharded in some units, as at ZeRO 2
                 and each parameter more of it                      the same of few parameters and of many, all of them small
    shared       a sum that layers stand still for                  products alone, and with a sum between: few or many, small or large.
                 The longer ranks compute before they meet, the longer one of them waits for the other

    an update    whatever it updates, and each parameter more       ZeRO 0: few parameters, many, all of them small

Invariant: collective over all ranks; no engine is left, and what is random goes on as it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspeed.memory.estimator import Estimate, Estimator
from deepspeed.profiling.rates import Rates, undisturbed

NUM_LAYERS, WIDTH = 12, 256
SAMPLES = 128
"""So many that ranks compute between messages, as they do in a model's backward: who waits there is woken on a busy core."""
NUM_UNITS = 6
"""In which parameters are gathered where they are sharded: neighbours below a million elements would be one."""
SUMS = 6
PRODUCTS = (1, 16)
"""Between two sums: about as long as a layer of a tiny and of a small model computes."""
LARGER = 8
"""Times as many bytes of a sum, to tell what they cost."""
PASSES, NUM_TURNS = 2, 16
"""All is compared twice, since what else a machine does lasts longer than one comparison."""
ENOUGH_S = 1.5
"""After so long no other turn of a comparison begins."""
SETTLE_S = 0.002
"""In which messages of a tiny backward are through."""
NUM_WARM = 3
FEW, MANY, NARROW = 12, 108, 32
"""Parameters whose update is all overhead, and their width."""
SMALL = {"reduce_bucket_size": WIDTH * WIDTH}
SHARDED = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
"""Gathered in forward, and again in backward."""
UNSHARDS = ({**SHARDED, "stage3_prefetch_bucket_size": 0}, SHARDED, {"stage": 3})
Turns = list[list[float]]
"""Seconds, [turns][what is compared]."""


class Stack(nn.Module):
    """Linear layers in units that ZeRO 3 gathers one by one."""

    def __init__(self, layers: int = NUM_LAYERS, width: int = WIDTH) -> None:
        super().__init__()
        for i in range(NUM_UNITS):  # no list of them, which would be cut by size
            some = (nn.Linear(width, width, bias=False) for _ in range(layers // NUM_UNITS))
            self.add_module(f"unit{i}", nn.Sequential(*some))

    def forward(self, x: Tensor) -> Tensor:
        """[] a loss of x [batch, width]."""
        for unit in self.children():
            x = unit(x)
        return x.square().mean()


def message_costs(make_engine: Callable[..., Any], rates: Rates) -> dict[str, float]:
    """Fields of `profiling.rates.Rates` by name; where one rank is alone, the update's only. Collective over all ranks.

    make_engine: of `model` and `config` by name, a DeepSpeedEngine. rates: what bytes cost here.
    """

    def steps(zeros: Sequence[Mapping[str, Any]], layers: int = NUM_LAYERS, width: int = WIDTH) -> Turns:
        return _steps(make_engine, zeros, layers, width)

    comparisons: dict[str, Callable[[], Turns]] = {"update": lambda: _updates(make_engine)}
    if dist.is_initialized() and dist.get_world_size() > 1:
        comparisons |= {
            "sum_message_s": lambda: steps(_buckets(0)),
            "message_s": lambda: steps(_buckets(1)),
            "unshard": lambda: steps(UNSHARDS),
            "few": lambda: steps(UNSHARDS[1:], FEW, NARROW),
            "many": lambda: steps(UNSHARDS[1:], MANY, NARROW),
            "shared": _shared,
        }
    with torch.random.fork_rng():
        seconds = _compared(comparisons)
        return _updates_s(seconds) | (_messages_s(seconds, rates) if len(seconds) > 1 else {})


def _updates_s(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    few_s, many_s = seconds["update"]
    each_s = max(0.0, many_s - few_s) / (MANY - FEW)
    return {"update_s": max(0.0, few_s - FEW * each_s), "update_param_s": each_s}


def _messages_s(seconds: Mapping[str, Sequence[float]], rates: Rates) -> dict[str, float]:
    found = {}
    for stage, name in enumerate(("sum_message_s", "message_s")):
        more, fewer = map(_num_messages, _estimates(_buckets(stage)))
        more_s, fewer_s = seconds[name]
        found[name] = max(0.0, more_s - fewer_s) / (more - fewer)
    return {**found, **_unshards(seconds, rates, found["message_s"]), **_amid(seconds["shared"], rates)}


def shared_costs(rates: Rates) -> dict[str, float]:
    """Those of messages amid computing alone. Collective."""
    return _amid(_compared({"shared": _shared})["shared"], rates)


def _compared(comparisons: Mapping[str, Callable[[], Turns]]) -> dict[str, list[float]]:
    """Seconds of all that is compared, of the slowest rank."""
    turns: dict[str, Turns] = {name: [] for name in comparisons}
    for _ in range(PASSES):
        for name, compare in comparisons.items():
            turns[name] += _slowest(compare())
    return {name: [undisturbed(column) for column in zip(*rows, strict=True)] for name, rows in turns.items()}


def _buckets(stage: int) -> list[dict[str, Any]]:
    """Many, and one."""
    return [{"stage": stage, **SMALL}, {"stage": stage}]


def _num_messages(estimate: Estimate) -> int:
    return sum(op.calls for op in estimate.messages.values())


def _unshards(seconds: Mapping[str, Sequence[float]], rates: Rates, message_s: float) -> dict[str, float]:
    """Of a gather around a module, not prefetched and prefetched, beside ZeRO 3 whose parameters are small enough to stay."""
    (few_s, few_kept_s), (many_s, many_kept_s) = seconds["few"], seconds["many"]
    few, many = (_estimates(UNSHARDS[:1], layers, NARROW)[0].unshards.params for layers in (FEW, MANY))
    param_s = max(0.0, many_s - many_kept_s - (few_s - few_kept_s)) / (many - few)
    sharded, _, kept = _estimates(UNSHARDS)
    size, times = dist.get_world_size(), sharded.unshards
    more = sum(op.nbytes for op in sharded.messages.values()) - sum(op.nbytes for op in kept.messages.values())
    others = _num_messages(sharded) - times.calls - _num_messages(kept)
    known_s = more * (size - 1) / size / max(rates.wire_nbytes_s, 1.0) + others * message_s + times.params * param_s
    late_s, early_s, kept_s = seconds["unshard"]
    prices = [max(0.0, (step_s - kept_s - known_s) / times.calls) for step_s in (early_s, late_s)]
    return {**dict(zip(("unshard_s", "unshard_late_s"), prices, strict=True)), "unshard_param_s": param_s}


def _amid(times: Sequence[float], rates: Rates) -> dict[str, float]:
    """Of a sum between products: what it costs whatever its bytes, what each byte does, and by what share of the computing before it it waits."""
    few_s, few_sent_s, few_more_s, many_s, many_sent_s = (time_s / SUMS for time_s in times)
    size = dist.get_world_size()
    sent, more = (2 * (size - 1) / size * tensor.nbytes for tensor in _summed())
    byte_s = max(0.0, few_more_s - few_sent_s) / (more - sent)
    byte_s = max(byte_s, 1 / max(rates.sum_nbytes_s or rates.wire_nbytes_s, 1.0))
    waits = max(0.0, many_sent_s - many_s - (few_sent_s - few_s)) / max(many_s - few_s, 1e-9)
    fixed_s = few_sent_s - few_s - waits * few_s - sent * byte_s
    return {"shared_message_s": max(0.0, fixed_s), "shared_nbytes_s": 1 / byte_s, "shared_wait": waits}


def _summed() -> tuple[Tensor, Tensor]:
    """A small sum's tensor, and one of more bytes."""
    return torch.ones(SAMPLES, WIDTH // 2), torch.ones(SAMPLES, LARGER * WIDTH // 2)


def _shared() -> Turns:
    """Sums between products, and products alone."""
    layer, x = nn.Linear(WIDTH, WIDTH, bias=False), torch.ones(SAMPLES, WIDTH)
    sent, more = _summed()

    def run(products: int, summed: Tensor | None) -> None:
        with torch.no_grad():
            for _ in range(SUMS):
                for _ in range(products):
                    layer(x)
                if summed is not None:
                    dist.all_reduce(summed)

    few, many = PRODUCTS
    asked = [(few, None), (few, sent), (few, more), (many, None), (many, sent)]
    return _in_turns([lambda how=how: run(*how) for how in asked])  # type: ignore[misc]


def _estimates(zeros: Sequence[Mapping[str, Any]], layers: int = NUM_LAYERS, width: int = WIDTH) -> list[Estimate]:
    estimator = Estimator(Stack(layers, width), torch.ones(SAMPLES, width))
    return [estimator.estimate(_config(zero), world_size=dist.get_world_size(), bounds=False) for zero in zeros]


def _config(zero: Mapping[str, Any]) -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": SAMPLES, "optimizer": {"type": "AdamW"}, "zero_optimization": {**zero}}


def _steps(make_engine: Callable[..., Any], zeros: Sequence[Mapping[str, Any]], layers: int, width: int) -> Turns:
    """Steps of each."""
    engines = [make_engine(model=Stack(layers, width), config=_config(zero)) for zero in zeros]
    x = torch.ones(SAMPLES, width)

    def step(engine: Any) -> None:
        engine.backward(engine(x))
        engine.step()

    found = _in_turns([lambda engine=engine: step(engine) for engine in engines])  # type: ignore[misc]
    for engine in engines:
        engine.destroy()
    return found


def _updates(make_engine: Callable[..., Any]) -> Turns:
    """Updates of few parameters and of many."""
    x = torch.ones(1, NARROW)
    engines = [make_engine(model=Stack(layers, NARROW), config=_config({"stage": 0})) for layers in (FEW, MANY)]

    def update_s(engine: Any) -> float:
        engine.backward(engine(x))
        _meet()
        time.sleep(SETTLE_S)
        start_s = time.perf_counter()
        engine.step()
        return time.perf_counter() - start_s

    turns = [[update_s(engine) for engine in engines] for _ in range(NUM_WARM + NUM_TURNS)][NUM_WARM:]
    for engine in engines:
        engine.destroy()
    return turns


def _meet() -> None:
    if dist.is_initialized():
        dist.barrier()


def _slowest(turns: Turns) -> Turns:
    """Seconds of the slowest rank."""
    slowest = torch.tensor(turns, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.tolist()


def _in_turns(runs: Sequence[Callable[[], None]]) -> Turns:
    """Seconds of each run in each turn. Collective."""
    turns: Turns = []
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
    return turns
