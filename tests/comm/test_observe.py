"""ZeRO's own traffic as the log sees it: bytes per step as the theory says, latencies, what was hidden."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deepspeed import comm
from deepspeed.comm.choose import make_exchange
from deepspeed.comm.exchange import Pending, verb
from deepspeed.comm.observe import hidden_share, measure_alone
from deepspeed.comm.recorder import Current, Flow, Recorder
from deepspeed.utils.waits import COMMUNICATION, Waits
from deepspeed.zero.layout import ALIGNMENT
from tests.engine.runs import engine_of, make_config
from tests.harness import run_ranks
from tests.models import build, make_batches, rank_share

ACCUMULATION, STEPS, SAMPLES = 3, 2, 4


def traffic_of_a_step(rank: int, world_size: int, stage: int, reuse: int) -> dict[str, int]:
    """Message bytes of one step by operation, and `padded`: bytes of all buckets."""
    zero = {"stage3_max_reuse_distance": reuse, "stage3_param_persistence_threshold": 0}
    config = make_config(stage, micro=SAMPLES // world_size, accumulation=ACCUMULATION, zero=zero)
    model = build("mlp")
    batches = make_batches(model, num_steps=STEPS + 1, accumulation=ACCUMULATION, samples=SAMPLES)
    with engine_of(model, config) as engine:
        comm.configure(enabled=True)
        try:
            for i, step in enumerate(batches):
                if i == 1:  # the first step agrees on orders
                    comm.reset_log()
                for micro in step:
                    engine.backward(engine(*rank_share(micro, rank, world_size)))
                    engine.step()
            flows = Current.recorder.flows.items() if Current.recorder else []
            seen: dict[str, int] = {}
            for (op, nbytes, _), flow in flows:
                seen[op] = seen.get(op, 0) + nbytes * flow.count // STEPS
            buckets = engine._built.buckets
            seen["padding"] = 4 * len(buckets) * world_size * ALIGNMENT
            seen["padded"] = sum(bucket.layout.padded_numel * 4 for bucket in buckets)
            seen["numel"] = sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in engine.module.parameters())
        finally:
            comm.configure(enabled=False)
            Current.recorder = None
    return {op: n for op, n in seen.items() if n}


FAR, NEAR = 1_000_000_000, 0
THEORY: dict[tuple[int, int], dict[str, int]] = {
    # How often the model's bytes travel in a step of three micro-batches (arXiv:1910.02054, section 7).
    (0, FAR): {"zero.all_reduce": 1},
    (1, FAR): {"zero.reduce_scatter": 1, "zero.all_gather": 1},
    (2, FAR): {"zero.reduce_scatter": ACCUMULATION, "zero.all_gather": 1},
    (3, FAR): {"zero.reduce_scatter": ACCUMULATION, "zero.all_gather": ACCUMULATION},
}


@pytest.mark.parametrize(("stage", "reuse"), THEORY)
def test_bytes_of_a_step_are_those_of_the_theory(stage: int, reuse: int) -> None:
    for seen in run_ranks(2, traffic_of_a_step, stage, reuse):
        padded, numel, padding = (seen.pop(key) for key in ("padded", "numel", "padding"))
        assert numel * 4 <= padded <= numel * 4 + padding
        assert seen == {op: times * padded for op, times in THEORY[stage, reuse].items()}


def test_without_reuse_stage_3_gathers_in_forward_and_again_in_backward_but_for_what_is_used_last() -> None:
    for seen in run_ranks(2, traffic_of_a_step, 3, NEAR):
        padded = seen["padded"]
        assert seen["zero.reduce_scatter"] == ACCUMULATION * padded
        assert ACCUMULATION * padded < seen["zero.all_gather"] <= 2 * ACCUMULATION * padded


class SlowExchange:
    """An all-gather that ends `seconds` after its start."""

    group, rank, world_size, is_watched = None, 0, 2, True

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    @verb
    def start_all_gather(self, full: torch.Tensor, shard: torch.Tensor | None = None) -> Pending:
        end_s = time.monotonic() + self.seconds
        return Pending(lambda: time.sleep(max(0.0, end_s - time.monotonic())))


def test_what_runs_beside_computation_is_hidden_and_what_is_waited_for_is_not() -> None:
    exchange = SlowExchange(0.1)
    full = torch.zeros(8)
    recorder = Current.recorder = Recorder()
    try:
        before = COMMUNICATION.seconds
        first = exchange.start_all_gather(full)
        time.sleep(0.12)  # computation that takes longer
        first.wait()
        assert COMMUNICATION.seconds - before < 0.05
        exchange.start_all_gather(full).wait()
        assert 0.09 < COMMUNICATION.seconds - before < 0.2
    finally:
        Current.recorder = None
    (flow,) = recorder.flows.values()
    flow.alone_s = 0.1
    assert flow.count == 2
    assert hidden_share([flow]) == pytest.approx(0.5, abs=0.2)
    line = recorder.summary(2)["zero.all_gather"][32]
    assert (line["count"], line["avg_latency_ms"]) == (2, pytest.approx(100))
    assert line["busbw_avg_gbps"] == pytest.approx(line["tput_avg_gbps"] / 2)
    assert line["hidden"] == pytest.approx(0.5, abs=0.2)


def test_nothing_is_hidden_of_what_was_never_measured() -> None:
    assert hidden_share([Flow(lambda: lambda: None, count=3)]) is None


def measured_alone(rank: int, world_size: int) -> dict[str, Any]:
    comm.configure(enabled=True)
    try:
        exchange = make_exchange(dist.group.WORLD, torch.device("cpu"), is_watched=True)
        full, out = torch.ones(4000), torch.zeros(2000)
        exchange.start_all_gather(full).wait()
        exchange.start_reduce_scatter(full, out, accumulate=False).wait()
        exchange.start_all_reduce(full).wait()
        if rank == 0:  # what only one rank saw is measured by none: the others would never come
            exchange_key = ("zero.all_gather", 999, "only here")
            assert Current.recorder is not None
            Current.recorder.flows[exchange_key] = Flow(lambda: lambda: None, count=1)
        summary = comm.log_summary(show_straggler=True, return_dict=True)
        assert Current.recorder is not None
        alone = [flow.alone_s for key, flow in Current.recorder.flows.items() if key[1] != 999]
        assert all(seconds is not None and seconds > 0 for seconds in alone)
        measure_alone(Current.recorder)
        assert alone == [flow.alone_s for key, flow in Current.recorder.flows.items() if key[1] != 999]
        assert comm.get_comm_operation_count() == 3 + (rank == 0)
        comm.reset_log()
        assert not comm.has_comm_data()
        return summary or {}
    finally:
        comm.configure(enabled=False)
        Current.recorder = None


def test_log_summary_measures_each_verb_by_itself_and_compares_ranks() -> None:
    for summary in run_ranks(2, measured_alone):
        for op in ("zero.all_gather", "zero.reduce_scatter", "zero.all_reduce"):
            line = summary["summary"][op][16000]
            assert line["count"] == 1
            assert line["avg_latency_ms"] > 0
            assert 0 <= line["hidden"] <= 1
            assert summary["straggler_analysis"][op][16000] >= 0


class Event:
    """A device event that was passed at `ms`."""

    def __init__(self, ms: float) -> None:
        self.ms = ms

    def synchronize(self) -> None:
        """Passed."""

    def elapsed_time(self, end: Event) -> float:
        return end.ms - self.ms


def test_waits_of_a_device_are_read_from_its_events() -> None:
    waits = Waits()
    waits.add(0.5, "read", 100)
    for start in range(2000):
        waits.add_events(Event(start), Event(start + 1.0))
    assert waits.seconds == pytest.approx(0.5 + 2.0)
    assert waits.seconds == pytest.approx(2.5)
    assert waits.nbytes == {"read": 100}
