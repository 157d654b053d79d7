"""A user's mpu becomes a mesh, or the same error on every rank."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

import deepspeed
from deepspeed.mesh import data_parallel_mesh
from deepspeed.mesh.door import Coordinate, Told, shape_of
from deepspeed.mesh.shape import MeshShape
from deepspeed.utils.errors import DeepSpeedConfigError
from tests.engine.runs import make_config
from tests.harness import run_ranks
from tests.models import build


def told(*all_groups: list[list[int]], names: tuple[str, ...] = ("dp", "tp")) -> list[Told]:
    """What ranks say whose mpu has these groups of each dim."""
    world = sum(len(ranks) for ranks in all_groups[0])
    found: list[Told] = []
    for rank in range(world):
        coordinates = {}
        for name, groups in zip(names, all_groups, strict=False):
            mine = next(tuple(ranks) for ranks in groups if rank in ranks)
            coordinates[name] = Coordinate(mine.index(rank), len(mine), mine)
        found.append(Told(coordinates))
    return found


def test_groups_in_the_contract_s_order_need_no_order_of_their_own() -> None:
    shape = shape_of(told([[0, 2], [1, 3]], [[0, 1], [2, 3]]))
    assert shape == MeshShape(dp_shard=2, tp=2)


def test_groups_in_another_order_are_kept_as_they_are() -> None:
    shape = shape_of(told([[0, 1], [2, 3]], [[0, 2], [1, 3]]))
    assert (shape.order, shape.groups("batch"), shape.groups("tensor")) == (
        (0, 2, 1, 3),
        [(0, 1), (2, 3)],
        [(0, 2), (1, 3)],
    )


def test_three_dims_and_shard_groups_inside_of_the_data_ranks() -> None:
    pipe, data, model = (MeshShape(pp=2, dp_shard=4, tp=2).groups(role) for role in ("pipeline", "batch", "tensor"))
    as_lists = [[list(ranks) for ranks in groups] for groups in (pipe, data, model)]
    shape = shape_of(told(*as_lists, names=("pp", "dp", "tp")), shard_size=2)
    assert shape == MeshShape(pp=2, dp_replicate=2, dp_shard=2, tp=2)


def test_where_data_is_all_that_is_told_the_rest_counts_as_one_model() -> None:
    shape = shape_of(told([[0, 2], [1, 3]]))
    assert shape == MeshShape(dp_shard=2, tp=2)


def test_places_without_groups_are_enough() -> None:
    everyone = [Told({"dp": Coordinate(rank % 2, 2), "tp": Coordinate(rank // 2, 2)}) for rank in range(4)]
    assert shape_of(everyone).groups("tensor") == [(0, 2), (1, 3)]


CROSSED = told([[0, 1], [2, 3]], [[0, 2], [1, 3]])
CROSSED[3].coordinates["tp"] = Coordinate(1, 2, (0, 3))
SIZES = [Told({"dp": Coordinate(0, 2)}), Told({"dp": Coordinate(1, 2)}), Told({"dp": Coordinate(0, 3)})]


@pytest.mark.parametrize(
    ("everyone", "message"),
    [
        ([Told({}), Told({}, "Mpu has no data")], r"on rank 1: Mpu has no data"),
        (SIZES, "rank 0 tells sizes data_parallel 2, rank 2 data_parallel 3"),
        ([Told({"dp": Coordinate(0, 2), "tp": Coordinate(0, 2)})] * 2, r"make up the 2 ranks of the job: data_parallel 2 x slice_parallel 2 = 4"),
        ([Told({"dp": Coordinate(0, 2), "tp": Coordinate(0, 1)})] * 2, "ranks 0 and 1 have the same place: data_parallel 0"),
        ([Told({"dp": Coordinate(rank, 2), "tp": Coordinate(0, 1)}) for rank in (0, 2)], "rank 1 is number 2 of 2 in its data_parallel group"),
        (told([[0, 1], [2, 3]], [[0, 1], [2, 3]]), "ranks 0 and 2 have the same place"),
        (CROSSED, r"rank 3's slice_parallel group is \[0, 3\], but by the places that all ranks told it would be \[1, 3\]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_named_with_its_rank(everyone: list[Told], message: str) -> None:
    with pytest.raises(DeepSpeedConfigError, match=message):
        shape_of(everyone)


class Mpu:
    """Two data-parallel groups of two ranks, with the six getters of the contract."""

    def __init__(self, rank: int, *, name: str = "model") -> None:
        self.data, self.model = (
            next(group for ranks, group in made if rank in ranks)
            for made in ([(r, dist.new_group(r)) for r in pairs] for pairs in ([[0, 2], [1, 3]], [[0, 1], [2, 3]]))
        )
        for kind, group in (("data", self.data), (name, self.model)):
            setattr(self, f"get_{kind}_parallel_group", lambda group=group: group)
            setattr(self, f"get_{kind}_parallel_world_size", lambda group=group: dist.get_world_size(group))
            setattr(self, f"get_{kind}_parallel_rank", lambda group=group: dist.get_rank(group))

    def close(self) -> None:
        for group in (self.data, self.model):
            dist.destroy_process_group(group)


def with_mpu(rank: int, world_size: int, name: str) -> tuple[Any, ...]:
    mpu = Mpu(rank, name=name)
    engine, *_ = deepspeed.initialize(model=build("mlp"), config=make_config(2, micro=1), mpu=mpu)
    found = (
        engine.dp_world_size,
        engine.mp_world_size,
        engine.train_batch_size(),
        engine.mesh.ranks("batch"),
        engine.mesh.ranks("tensor"),
        engine.mesh.given[engine.mesh.shape.dims("tensor")] is mpu.model,
    )
    engine.destroy()
    mpu.close()
    return found


@pytest.mark.parametrize("name", ["model", "tensor_model", "slice"])
def test_an_engine_takes_its_ranks_from_the_mpu(name: str) -> None:
    found = run_ranks(4, with_mpu, name)
    assert found[1] == (2, 2, 2, (1, 3), (0, 1), True)
    assert found[2] == (2, 2, 2, (0, 2), (2, 3), True)


def _broken(rank: int) -> Any:
    raise RuntimeError(f"no group yet on {rank}")


def refused(rank: int, world_size: int, make: Callable[[int], Any]) -> str:
    with pytest.raises(DeepSpeedConfigError) as caught:
        data_parallel_mesh(make(rank))
    return str(caught.value)


def raising_on_rank_1(rank: int) -> Any:
    group = dist.group.WORLD
    return SimpleNamespace(get_data_parallel_group=(lambda: _broken(1)) if rank == 1 else (lambda: group))


def without_getters(rank: int) -> Any:
    return SimpleNamespace()


def lying_about_its_size(rank: int) -> Any:
    return SimpleNamespace(get_data_parallel_group=lambda: dist.group.WORLD, get_data_parallel_world_size=lambda: 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (raising_on_rank_1, "on rank 1: SimpleNamespace could not tell its data_parallel group: RuntimeError: no group yet on 1"),
        (without_getters, r"on rank 0 \(and 1 more\): SimpleNamespace has neither get_data_parallel_group nor"),
        (lying_about_its_size, r"get_data_parallel_world_size\(\) is 3, its group has 2 ranks"),
    ],
)  # fmt: skip
def test_an_mpu_that_cannot_be_read_is_the_same_error_on_every_rank(make: Callable[[int], Any], message: str) -> None:
    texts = run_ranks(2, refused, make)
    assert texts[0] == texts[1]
    with pytest.raises(DeepSpeedConfigError, match=message):
        raise DeepSpeedConfigError(texts[0])


def test_a_module_of_sequence_parallelism_is_no_model_parallelism() -> None:
    from deepspeed.mesh.door import read_mpu

    sizes = {"data": 1, "sequence": 1, "model": 4}
    getters: dict[str, Any] = {
        f"get_{kind}_parallel_world_size": lambda size=size: size for kind, size in sizes.items()
    }
    mpu = SimpleNamespace(**getters, initialize_sequence_parallel=None)
    assert set(read_mpu(mpu, {}).coordinates) == {"dp", "sp"}


def test_getters_that_assert_their_groups_were_made_tell_nothing() -> None:
    from deepspeed.mesh.door import read_mpu

    def asserts() -> int:
        raise AssertionError("pipeline model parallel group is not initialized")

    mpu = SimpleNamespace(get_data_parallel_world_size=lambda: 1, get_pipe_parallel_world_size=asserts)
    assert set(read_mpu(mpu, {}).coordinates) == {"dp"}
