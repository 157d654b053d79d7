"""Topologies and grids: the contract's answers, and the grid as an mpu of our own mesh."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from deepspeed.mesh import data_parallel_mesh
from deepspeed.parallel.pipeline.grid import PipelineParallelGrid
from deepspeed.parallel.pipeline.topology import (
    PipeDataParallelTopology,
    PipeModelDataParallelTopology,
    ProcessTopology,
    _prime_factors,
)
from tests.harness import run_ranks

THREE = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=2)


def test_the_last_axis_varies_fastest() -> None:
    assert THREE.get_axis_names() == ["pipe", "data", "model"]
    assert [tuple(THREE.get_coord(rank)) for rank in (0, 1, 2, 4)] == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    assert all(THREE.get_rank(**THREE.get_coord(rank)._asdict()) == rank for rank in range(8))
    assert (THREE.world_size(), THREE.get_dim("data"), THREE.get_dim("none")) == (8, 2, 0)


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        ("pipe", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("data", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("model", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("none", []),
    ],
)
def test_groups_along_an_axis(axis: str, expected: list[list[int]]) -> None:
    assert THREE.get_axis_comm_lists(axis) == expected


def test_ranks_by_their_place() -> None:
    assert THREE.filter_match(pipe=0, model=1) == [1, 3]
    assert THREE.get_axis_list("data", 1) == [2, 3, 6, 7]


def test_names_in_files_leave_data_and_pipe_out() -> None:
    assert [THREE.get_rank_repr(rank) for rank in (0, 5)] == ["model_00", "model_01"]
    assert THREE.get_rank_repr(6, omit_axes=["data"]) == "pipe_01-model_00"
    assert PipeDataParallelTopology(2, 2).get_rank_repr(3) == ""


@pytest.mark.parametrize("kind", [ValueError, AssertionError])
def test_points_that_are_not_there_are_refused(kind: type[Exception]) -> None:
    with pytest.raises(kind, match="needs each of the axes"):
        THREE.get_rank(pipe=0)
    with pytest.raises(kind, match="there is no rank at"):
        THREE.get_rank(pipe=2, data=0, model=0)
    with pytest.raises(kind, match="rank 8 is not in the topology"):
        THREE.get_coord(8)
    with pytest.raises(kind, match="one positive size for each name"):
        ProcessTopology(["a", "b"], [2])


def test_prime_factors() -> None:
    assert [_prime_factors(n) for n in (1, 2, 12, 49, 97)] == [[], [2], [2, 2, 3], [7, 7], [97]]
    with pytest.raises(ValueError, match="0 has no prime factors"):
        _prime_factors(0)


def test_the_contract_s_paths_lead_here() -> None:
    import deepspeed.runtime.pipe.topology as public  # type: ignore[import-not-found]
    from deepspeed.runtime import pipe  # type: ignore[import-not-found]

    assert public.ProcessTopology is pipe.ProcessTopology is ProcessTopology
    assert public.PipelineParallelGrid is PipelineParallelGrid


def grid(rank: int, world_size: int) -> Any:
    made = PipelineParallelGrid(PipeModelDataParallelTopology(num_pp=2, num_mp=1, num_dp=2))
    mesh = data_parallel_mesh(made)
    found = {
        "stage": made.get_stage_id(),
        "data": (made.get_data_parallel_rank(), dist.get_process_group_ranks(made.get_data_parallel_group())),
        "pipe": dist.get_process_group_ranks(made.get_pipe_parallel_group()),
        "whole": (made.get_model_parallel_rank(), made.get_model_parallel_world_size()),
        "slice": (made.get_slice_parallel_rank(), made.get_slice_parallel_world_size()),
        "pairs": made.p2p_groups,
        "next": made.stage_to_global(1 - made.get_stage_id()),
        "mesh": (mesh.ranks("batch"), mesh.ranks("pipeline"), mesh.size("tensor")),
    }
    mesh.release()
    return found


def test_a_grid_is_an_mpu() -> None:
    assert run_ranks(4, grid)[2] == {
        "stage": 1,
        "data": (0, [2, 3]),
        "pipe": [0, 2],
        "whole": (1, 2),
        "slice": (0, 1),
        "pairs": [[0, 2], [1, 3], [2, 0], [3, 1]],
        "next": 0,
        "mesh": ((2, 3), (0, 2), 1),
    }


def test_without_a_topology_the_prime_factors_go_to_pipe_and_data_in_turn() -> None:
    assert run_ranks(4, default_sizes)[0] == (2, 2)


def default_sizes(rank: int, world_size: int) -> tuple[int, int]:
    made = PipelineParallelGrid()
    return made.get_pipe_parallel_world_size(), made.get_data_parallel_world_size()
