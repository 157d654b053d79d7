"""`deepspeed.utils.groups`: the contract's names answer from the mesh, an mpu, or groups the script created."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

import deepspeed
from deepspeed.mesh import groups
from deepspeed.mesh.script import ScriptGroups
from deepspeed.utils.errors import DeepSpeedConfigError, DeepSpeedError
from tests.harness import close_pools, run_ranks


def test_expert_groups_with_tensor_parallelism_are_the_contract_s() -> None:
    expert, expert_data = groups._get_expert_parallel_ranks(16, 2, 4)
    assert expert == [[0, 2, 4, 6], [8, 10, 12, 14], [1, 3, 5, 7], [9, 11, 13, 15]]
    assert expert_data == [[0, 8], [2, 10], [4, 12], [6, 14], [1, 9], [3, 11], [5, 13], [7, 15]]


def test_expert_groups_stay_inside_of_a_pipeline_stage() -> None:
    assert groups._get_expert_parallel_ranks(8, 1, 2, 2) == (
        [[0, 1], [2, 3], [4, 5], [6, 7]],
        [[0, 2], [1, 3], [4, 6], [5, 7]],
    )


def test_data_before_experts_swaps_the_two() -> None:
    assert groups._get_expert_parallel_ranks(8, 1, 2, 1, True) == (
        [[0, 4], [1, 5], [2, 6], [3, 7]],
        [[0, 1, 2, 3], [4, 5, 6, 7]],
    )


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(DeepSpeedConfigError, match="tensor parallel size 3 x pipeline parallel size 1 x expert"):
        groups._get_expert_parallel_ranks(16, 3, 4)


def end_groups() -> None:
    """Take this process's script groups away, as ending the default group would; when all ranks have made theirs, since what is not
    connected yet is connected to nobody once the others have gone."""
    dist.barrier()
    made: ScriptGroups = groups._made
    for name in made.names():
        found = made.find(name)
        assert found is not None
        dist.destroy_process_group(found.group)
    groups._made = ScriptGroups()
    groups.mpu = groups.mesh_device = None


def experts(rank: int, world_size: int) -> dict[str, Any]:
    try:
        groups._create_expert_and_data_parallel(2)
        groups._create_expert_and_data_parallel(2)  # idempotent
        groups._create_expert_and_data_parallel(4)
        return {
            "names": sorted(groups._get_expert_parallel_group_dict()),
            "data names": sorted(groups._get_expert_data_parallel_group_dict()),
            "ep": dist.get_process_group_ranks(groups._get_expert_parallel_group("ep_size_2")),
            "edp": dist.get_process_group_ranks(groups._get_expert_data_parallel_group("ep_size_2")),
            "ranks": (
                groups._get_expert_parallel_rank("ep_size_2"),
                groups._get_expert_data_parallel_rank("ep_size_2"),
            ),
            "sizes": (
                groups._get_expert_parallel_world_size("ep_size_4"),
                groups._get_expert_data_parallel_world_size("ep_size_4"),
            ),
            "sources": (groups._get_expert_broadcast_src_rank("ep_size_2"), groups._get_broadcast_src_rank()),
            "largest": groups._get_max_expert_size_name(),
            "same": groups._get_max_expert_parallel_group() is groups._get_expert_parallel_group("ep_size_4"),
        }
    finally:
        end_groups()


def test_expert_groups_by_name() -> None:
    assert run_ranks(4, experts)[3] == {
        "names": ["ep_size_2", "ep_size_4"],
        "data names": ["ep_size_2", "ep_size_4"],
        "ep": [2, 3],
        "edp": [1, 3],
        "ranks": (1, 1),
        "sizes": (4, 1),
        "sources": (1, 0),
        "largest": "ep_size_4",
        "same": True,
    }


def tensor(rank: int, world_size: int) -> Any:
    try:
        groups._init_tp_mesh_device(2)
        groups._init_tp_mesh_device(2)
        with pytest.raises(
            DeepSpeedConfigError, match="tensor parallel size 3 x data parallel size 1 do not make up the 4"
        ):
            groups._init_tp_mesh_device(3)
        with pytest.raises(DeepSpeedError, match="made before as"):
            groups._init_tp_mesh_device(4)
        found = (
            dist.get_process_group_ranks(groups.get_tensor_model_parallel_group()),
            dist.get_process_group_ranks(groups.get_data_parallel_group()),
            groups.get_model_parallel_world_size(),
            groups.get_model_parallel_rank(),
            groups.get_data_parallel_rank(),
            groups.get_tensor_model_parallel_src_rank(),
        )
        groups.set_tensor_model_parallel_rank(7)
        groups.set_tensor_model_parallel_world_size(8)
        forced = groups.get_tensor_model_parallel_rank(), groups.get_tensor_model_parallel_world_size()
        groups.set_tensor_model_parallel_rank(None)
        groups.set_tensor_model_parallel_world_size(None)
        return found, forced
    finally:
        end_groups()


def test_tensor_parallel_groups_are_consecutive_and_this_module_is_an_mpu() -> None:
    assert run_ranks(4, tensor)[2] == (([2, 3], [0, 2], 2, 0, 1, 2), (7, 8))


def experts_of_an_mpu(rank: int, world_size: int) -> Any:
    try:
        mpu = SimpleNamespace(get_model_parallel_world_size=lambda: 2)
        groups._create_expert_data_and_model_parallel(2, mpu)
        return dist.get_process_group_ranks(groups._get_expert_parallel_group("ep_size_2")), groups.mpu is mpu
    finally:
        end_groups()


def test_experts_of_an_mpu_have_groups_for_each_model_parallel_rank() -> None:
    assert run_ranks(4, experts_of_an_mpu) == [([0, 2], True), ([1, 3], True)] * 2


def without_anything(rank: int, world_size: int) -> Any:
    sizes = (groups._get_sequence_parallel_world_size(), groups._get_sequence_parallel_rank())
    for ask in (groups._get_sequence_parallel_group, groups.get_model_parallel_group):
        with pytest.raises(KeyError):
            ask()
    with pytest.raises(KeyError, match=r"no groups 'expert_parallel.ep_size_3'.*MoE layer of that ep_size"):
        groups._get_expert_parallel_group("ep_size_3")
    with pytest.raises(KeyError, match="no expert-parallel groups"):
        groups._get_max_expert_size_name()
    assert groups._get_data_parallel_group() is dist.group.WORLD
    return sizes, groups._get_zero_param_intra_parallel_group(), groups._ZERO_PARAM_INTRA_PARALLEL_GROUP


def test_what_nobody_made_is_a_key_error_that_says_who_would() -> None:
    close_pools()  # an engine that an earlier test left alive would be asked
    assert run_ranks(2, without_anything)[0] == ((1, 0), None, None)


def near(rank: int, world_size: int) -> Any:
    try:
        with pytest.raises(DeepSpeedConfigError, match="zero_hpz_partition_size = 3 does not divide the 4 ranks"):
            groups._create_zero_param_parallel_group(3)
        groups._create_zero_param_parallel_group(2)
        both = groups._get_local_all_to_all_group()
        return groups._get_zero_param_intra_parallel_group_ranks(), sorted(both)
    finally:
        end_groups()


def test_groups_of_hpz_and_of_the_two_step_all_to_all() -> None:
    found = run_ranks(4, near)
    assert [ranks for ranks, _ in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert all(len(names) == 2 for _, names in found)


def test_the_public_path_is_this_module() -> None:
    assert deepspeed.utils.groups is groups
