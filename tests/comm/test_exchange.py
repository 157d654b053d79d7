"""The flat verbs against their definition, on gloo ranks."""

from __future__ import annotations

import random
import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.comm.choose import Sharing, make_exchange
from deepspeed.comm.collective import CollectiveExchange
from deepspeed.comm.direct import ONE_PHASE_NUMEL, DirectExchange
from deepspeed.comm.exchange import Exchange, slices_of
from deepspeed.comm.local import LocalExchange
from deepspeed.comm.shared import SharedExchange
from tests.harness import close_pools, end_group, run_ranks

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KINDS = ["direct", "shared", "collective"]
WORLD_SIZES = [1, 2, 3]


@pytest.fixture(scope="module", autouse=True)
def _new_ranks() -> None:
    """Meshes of earlier tests live as long as their ranks, and a process has so many boards at once."""
    close_pools()


def _exchange(kind: str) -> Exchange:
    group = dist.group.WORLD
    assert group is not None
    if group.size() == 1:
        return LocalExchange(group)
    if kind == "shared":
        exchange = make_exchange(group, CPU, sharing=Sharing.ALWAYS)
        assert isinstance(exchange, SharedExchange)
        return exchange
    return DirectExchange(group) if kind == "direct" else CollectiveExchange(group)


def _inputs(world_size: int, numel: int, dtype: torch.dtype) -> list[Tensor]:
    """Every rank's full buffer, the same on every rank."""
    generator = torch.Generator().manual_seed(numel)
    return [torch.randn(numel, generator=generator).to(dtype) for _ in range(world_size)]


def _rank_order_sum(inputs: list[Tensor]) -> Tensor:
    wide = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
    total = inputs[0].to(wide)
    for full in inputs[1:]:
        total = total + full.to(wide)
    return total


def _gather_all_sizes(rank: int, world_size: int, kind: str) -> None:
    exchange = _exchange(kind)
    for dtype in (*DTYPES, torch.int64):
        for shard_numel in (0, 1, 7, 1000):
            expected = torch.arange(world_size * shard_numel).to(dtype)
            own = slice(rank * shard_numel, (rank + 1) * shard_numel)
            full = torch.zeros_like(expected)
            exchange.start_all_gather(full, expected[own].clone()).wait()
            assert torch.equal(full, expected)
            full.zero_()
            full[own] = expected[own]
            exchange.start_all_gather(full, None).wait()
            assert torch.equal(full, expected)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_all_gather_fills_every_slice_in_place(world_size: int, kind: str) -> None:
    run_ranks(world_size, _gather_all_sizes, kind)


def _reduce_scatter(rank: int, world_size: int, shard_numel: int, wire: torch.dtype, out_dtype: torch.dtype) -> None:
    exchange = _exchange("direct")
    inputs = _inputs(world_size, world_size * shard_numel, wire)
    own = slice(rank * shard_numel, (rank + 1) * shard_numel)
    expected = (_rank_order_sum(inputs) / 3)[own].to(out_dtype)
    out = torch.full((shard_numel,), 9.0, dtype=out_dtype)
    exchange.start_reduce_scatter(inputs[rank].clone(), out, divide_by=3, accumulate=False).wait()
    assert torch.equal(out, expected)
    exchange.start_reduce_scatter(inputs[rank].clone(), out, divide_by=3, accumulate=True).wait()
    torch.testing.assert_close(out, expected + expected)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("wire", DTYPES)
@pytest.mark.parametrize("shard_numel", [0, 1, 1000, 300_001])
def test_direct_reduce_scatter_adds_in_rank_order_and_at_least_fp32(
    world_size: int, wire: torch.dtype, shard_numel: int
) -> None:
    for out_dtype in {wire, torch.float32}:
        run_ranks(world_size, _reduce_scatter, shard_numel, wire, out_dtype)


def _reduce_scatter_into_itself(rank: int, world_size: int, kind: str) -> None:
    inputs = _inputs(world_size, world_size * 64, torch.float32)
    own = slice(rank * 64, (rank + 1) * 64)
    full = inputs[rank].clone()
    _exchange(kind).start_reduce_scatter(full, full[own], divide_by=world_size, accumulate=False).wait()
    torch.testing.assert_close(full[own], _rank_order_sum(inputs)[own] / world_size)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_reduce_scatter_may_write_into_its_own_slice(world_size: int, kind: str) -> None:
    run_ranks(world_size, _reduce_scatter_into_itself, kind)


def _collective_reduce_scatter(rank: int, world_size: int, wire: torch.dtype) -> None:
    exchange = _exchange("collective")
    inputs = _inputs(world_size, world_size * 10, wire)
    expected = (_rank_order_sum(inputs) / 2)[rank * 10 : (rank + 1) * 10]
    out = torch.ones(10)
    exchange.start_reduce_scatter(inputs[rank].clone(), out, divide_by=2, accumulate=True).wait()
    torch.testing.assert_close(out, expected + 1, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
def test_collective_reduce_scatter_accumulates_across_dtypes(world_size: int, wire: torch.dtype) -> None:
    run_ranks(world_size, _collective_reduce_scatter, wire)


def _all_reduce_like_scatter_and_gather(rank: int, world_size: int, numel: int, dtype: torch.dtype) -> None:
    exchange = _exchange("direct")
    inputs = _inputs(world_size, numel, dtype)
    reduced = inputs[rank].clone()
    exchange.start_all_reduce(reduced, 3).wait()
    assert torch.equal(reduced, (_rank_order_sum(inputs) / 3).to(dtype))
    if numel % world_size == 0:
        shard_numel = numel // world_size
        full = inputs[rank].clone()
        own = full[rank * shard_numel : (rank + 1) * shard_numel]
        exchange.start_reduce_scatter(full, own, divide_by=3, accumulate=False).wait()
        exchange.start_all_gather(full, None).wait()
        assert torch.equal(reduced, full)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numel", [0, 1, 6, 100_001, 600_000])
def test_all_reduce_has_the_bits_of_reduce_scatter_and_all_gather(
    world_size: int, dtype: torch.dtype, numel: int
) -> None:
    run_ranks(world_size, _all_reduce_like_scatter_and_gather, numel, dtype)


def _collective_all_reduce(rank: int, world_size: int) -> None:
    inputs = _inputs(world_size, 11, torch.float32)
    _exchange("collective").start_all_reduce(inputs[rank], world_size).wait()
    torch.testing.assert_close(inputs[rank], _rank_order_sum(_inputs(world_size, 11, torch.float32)) / world_size)


def test_collective_all_reduce_averages() -> None:
    run_ranks(2, _collective_all_reduce)


def _many_in_flight(rank: int, world_size: int, kind: str) -> None:
    exchange = _exchange(kind)
    sizes = [random.Random(5).choice([0, 1, 3, 50, 70_000]) for _ in range(60)]
    started = []
    for i, shard_numel in enumerate(sizes):
        full = torch.full((world_size * shard_numel,), float(i + rank))
        total = torch.full((shard_numel,), float(sum(i + r for r in range(world_size))))
        if i % 3 == 0:
            expected = torch.arange(world_size).repeat_interleave(shard_numel) + float(i)
            started.append((exchange.start_all_gather(full, None), full, expected))
        elif i % 3 == 1:
            out = torch.empty(shard_numel)
            started.append((exchange.start_reduce_scatter(full, out, accumulate=False), out, total))
        else:
            started.append((exchange.start_all_reduce(full), full, total.repeat(world_size)))
    random.Random(7 if kind == "collective" else rank).shuffle(started)
    for pending, result, expected in started:
        pending.wait()
        assert torch.equal(result, expected)
        pending.wait()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_many_may_be_in_flight_and_waited_for_out_of_order(world_size: int, kind: str) -> None:
    run_ranks(world_size, _many_in_flight, kind)


def _second_phase(rank: int, world_size: int) -> int:
    exchange = _exchange("direct")
    assert isinstance(exchange, DirectExchange)
    fulls = [torch.full((ONE_PHASE_NUMEL + 3,), float(10 * i + rank)) for i in range(2)]
    first = exchange.start_all_reduce(fulls[0])
    deadline = time.monotonic() + 60
    while not exchange.first_phases[0].is_done and time.monotonic() < deadline:
        time.sleep(0.001)
    second = exchange.start_all_reduce(fulls[1])
    num_left = len(exchange.first_phases)
    for i, pending in reversed(list(enumerate((first, second)))):
        pending.wait()
        assert fulls[i].unique().tolist() == [sum(10 * i + r for r in range(world_size))]
    return num_left


def test_a_second_phase_is_started_with_the_next_message_and_not_by_the_wait_alone() -> None:
    assert run_ranks(3, _second_phase) == [1, 1, 1]


def _pending_keeps_its_tensors(rank: int, world_size: int) -> None:
    exchange = make_exchange(None, CPU)
    out = torch.empty(1000)
    started = [exchange.start_reduce_scatter(torch.ones(1000 * world_size), out, accumulate=False) for _ in range(20)]
    for pending in started:
        out.zero_()
        pending.wait()
        assert torch.equal(out, torch.full((1000,), float(world_size)))


def test_the_sent_buffer_may_be_forgotten_by_its_caller() -> None:
    run_ranks(2, _pending_keeps_its_tensors)


def _reuse_of_scratch(rank: int, world_size: int) -> int:
    exchange = _exchange("direct")
    assert isinstance(exchange, DirectExchange)
    out = torch.empty(100)
    for _ in range(5):
        exchange.start_reduce_scatter(torch.ones(100 * world_size), out, accumulate=False).wait()
    return exchange.scratch.nbytes


def test_scratch_is_taken_again_instead_of_allocated() -> None:
    assert run_ranks(3, _reuse_of_scratch) == [800, 1200, 800], (
        "one message's, whose own slice only the rank between copies"
    )


def _subgroup(rank: int, world_size: int) -> None:
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    exchange = make_exchange(groups[0] if rank < 2 else groups[1], CPU)
    full = torch.full((2 * exchange.world_size,), float(rank))
    exchange.start_all_reduce(full).wait()
    assert full.tolist() == ([1.0] * 4 if rank < 2 else [2.0] * 2)
    full.fill_(float(rank))
    exchange.broadcast(full)
    assert full[0] == (0 if rank < 2 else 2)
    end_group(exchange.group)


def test_a_subgroup_exchanges_among_its_own_ranks() -> None:
    run_ranks(3, _subgroup)


def _chosen(rank: int, world_size: int) -> list[str]:
    return [type(make_exchange(None, torch.device(device))).__name__ for device in ("cpu", "meta")]


def test_gloo_on_cpu_is_direct_and_everything_else_collective() -> None:
    assert run_ranks(2, _chosen)[0] == ["DirectExchange", "CollectiveExchange"]
    assert run_ranks(1, _chosen)[0] == ["LocalExchange", "LocalExchange"]


def test_one_process_without_torch_distributed_exchanges_with_itself() -> None:
    exchange = make_exchange(None, CPU)
    out = torch.ones(4)
    exchange.start_reduce_scatter(torch.full((4,), 6.0), out, divide_by=2, accumulate=True).wait()
    assert (exchange.rank, exchange.world_size, exchange.group) == (0, 1, None)
    assert out.tolist() == [4.0] * 4


def test_a_buffer_that_does_not_divide_is_refused() -> None:
    with pytest.raises(AssertionError, match="7 elements are not 2 equal slices"):
        slices_of(torch.zeros(7), 2)
