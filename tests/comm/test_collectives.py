"""Every collective of `deepspeed.comm` against its meaning, and what the recorder counts."""

from __future__ import annotations

import inspect

import pytest
import torch

from deepspeed import comm
from deepspeed.comm import collectives
from deepspeed.comm.recorder import bus_factor, size_text
from tests.harness import run_ranks

_RECORDED = (
    "broadcast all_gather all_gather_into_tensor all_gather_coalesced reduce_scatter reduce_scatter_tensor all_reduce "
    "inference_all_reduce all_reduce_coalesced all_to_all_single all_to_all send recv gather scatter reduce barrier "
    "isend irecv batch_isend_irecv monitored_barrier"
)


@pytest.mark.parametrize("name", _RECORDED.split())
def test_every_collective_takes_the_extra_keywords(name: str) -> None:
    parameters = inspect.signature(getattr(comm, name)).parameters
    assert parameters["prof"].default is False
    assert parameters["log_name"].default == name
    assert "debug" in parameters


def _ones(value: float, numel: int = 2) -> torch.Tensor:
    return torch.full((numel,), float(value))


def _everything(rank: int, world_size: int) -> list[str]:
    mine = _ones(rank + 1)
    got = [torch.empty(2), torch.empty(2)]
    seen: list[list[float]] = []

    comm.all_reduce(mine)
    seen.append(mine.tolist())
    mine = _ones(rank + 1)
    comm.inference_all_reduce(mine, op=comm.ReduceOp.MAX)
    seen.append(mine.tolist())
    mine = _ones(rank + 1)
    comm.all_reduce_coalesced([mine])
    seen.append(mine.tolist())
    mine = _ones(rank + 1)

    comm.all_gather(got, mine)
    seen.append(torch.cat(got).tolist())
    full = torch.empty(4)
    comm.all_gather_into_tensor(full, mine)
    seen.append(full.tolist())
    comm.allgather_fn(full, mine)
    comm.all_gather_coalesced([full], [mine], async_op=True).wait()
    seen.append(full.tolist())

    piece = torch.empty(2)
    comm.reduce_scatter(piece, [mine, mine])
    seen.append(piece.tolist())
    comm.reduce_scatter_tensor(piece, full)
    seen.append((piece / (rank + 1)).tolist())
    comm.reduce_scatter_fn(piece, full)

    comm.all_to_all_single(full, torch.arange(4.0) + 10 * rank)
    seen.append((full - 2 * rank).tolist())
    comm.broadcast(mine, src=1)
    seen.append(mine.tolist())
    comm.reduce(mine, dst=0)
    comm.gather(mine, got if rank == 0 else None, dst=0)
    comm.scatter(piece, [_ones(5), _ones(5)] if rank == 0 else None, src=0)
    seen.append(piece.tolist())

    if rank == 0:
        comm.send(_ones(7), 1)
        comm.isend(_ones(8), 1).wait()
    else:
        assert comm.recv(piece, 0) == 0
        assert piece[0] == 7
        comm.irecv(piece, 0).wait()
        assert piece[0] == 8
    comm.barrier()
    comm.monitored_barrier()
    objects = [f"from {rank}"]
    comm.broadcast_object_list(objects, src=1)
    everyones = [None, None]
    comm.all_gather_object(everyones, rank)
    assert (objects, everyones) == (["from 1"], [0, 1])
    return [" ".join(f"{x:g}" for x in values) for values in seen]


def test_collectives_mean_what_torch_says() -> None:
    ones, gathered = "3 3", "1 1 2 2"
    expected = [ones, "2 2", ones, gathered, gathered, gathered, ones, "2 2", "0 1 10 11", "2 2", "5 5"]
    assert run_ranks(2, _everything) == [expected, expected]


def _recorded(rank: int, world_size: int) -> None:
    comm.configure(enabled=True)
    try:
        _everything(rank, world_size)
        comm.all_reduce(_ones(1, 256))
        summary = comm.log_summary(show_straggler=True, return_dict=True)
        assert summary is not None
        line = summary["summary"]["all_reduce"][1024]
        assert (line["count"], line["msg_size_bytes"], line["msg_size_str"]) == (1, 1024, "1 KB")
        assert line["busbw_avg_gbps"] == pytest.approx(line["tput_avg_gbps"])
        gather_line = summary["summary"]["all_gather_into_tensor"][16]
        assert gather_line["count"] == 2
        assert gather_line["busbw_avg_gbps"] == pytest.approx(gather_line["tput_avg_gbps"] / 2)
        assert gather_line["avg_latency_ms"] == pytest.approx(gather_line["total_latency_ms"] / 2)
        assert summary["straggler_analysis"]["all_reduce"][1024] >= 0
        assert summary["metadata"]["world_size"] == 2
        assert "all_to_all_single" in comm.get_logged_comm_ops()
        assert comm.get_comm_operation_count() > 15
        comm.reset_log()
        assert not comm.has_comm_data()
    finally:
        comm.configure(enabled=False)
    comm.all_reduce(_ones(1))
    assert (comm.has_comm_data(), comm.get_comm_operation_count(), comm.get_logged_comm_ops()) == (False, 0, [])


def test_the_recorder_counts_times_and_compares_ranks() -> None:
    run_ranks(2, _recorded)


def _listed(rank: int, world_size: int) -> list[str]:
    comm.configure(enabled=True, prof_all=False, prof_ops=["broadcast"])
    try:
        comm.all_reduce(_ones(1))
        comm.broadcast(_ones(1), src=0)
        comm.all_reduce(_ones(1), prof=True, log_name="the gradient norm")
        return comm.get_logged_comm_ops()
    finally:
        comm.configure(enabled=False)


def test_only_listed_operations_and_those_that_ask_are_recorded() -> None:
    assert run_ranks(1, _listed) == [["broadcast", "the gradient norm"]]


def test_without_a_recorder_a_collective_is_one_call() -> None:
    calls: list[tuple[object, ...]] = []
    collectives.run(lambda *args: calls.append(args), None, False, "x", None, 1, 2)
    assert calls == [(1, 2)]


def test_bus_factors_are_those_of_nccl_tests() -> None:
    factors = [bus_factor(op, 4) for op in ("all_reduce", "inference_all_reduce", "reduce_scatter_tensor", "broadcast")]
    assert factors == [1.5, 1.5, 0.75, 1.0]
    assert bus_factor("all_reduce", 1) == 1.0


def test_sizes_are_written_for_people() -> None:
    assert [size_text(n) for n in (0, 1023, 1536, 5 << 30)] == ["0 B", "1023 B", "1.5 KB", "5 GB"]


def test_the_extra_keywords_may_be_given_by_position_after_the_collective_s_own() -> None:
    taken = inspect.signature(comm.all_to_all_single)
    expected = "output tensor output_split_sizes input_split_sizes group async_op prof log_name debug"
    assert list(taken.parameters) == expected.split()
    assert comm.all_to_all_single.__annotations__["prof"] == "bool"
    with pytest.raises(TypeError, match="positional"):
        comm.barrier(None, False, None, False, "barrier", None, "one too many")
    with pytest.raises(TypeError, match="multiple values"):
        comm.barrier(None, False, None, True, prof=False)


def _named_by_position(rank: int, world_size: int) -> list[str]:
    comm.configure(enabled=True, prof_all=False, prof_ops=[])
    try:
        comm.all_reduce(_ones(1), comm.ReduceOp.SUM, None, False, True, "the loss")
        comm.broadcast(tensor=_ones(1), src=0, prof=True)
        return comm.get_logged_comm_ops()
    finally:
        comm.configure(enabled=False)


def test_an_operation_that_is_named_by_position_is_recorded_under_that_name() -> None:
    assert run_ranks(1, _named_by_position) == [["the loss", "broadcast"]]
