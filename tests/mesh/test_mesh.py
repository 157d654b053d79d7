"""The life of a mesh's groups: made at first use, shared by engines, ended with the default group, on all ranks alike."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

import deepspeed
from deepspeed.comm.exchange import NUM_TELL_ALL
from deepspeed.mesh import alike_everywhere, data_parallel_mesh
from deepspeed.utils.errors import DeepSpeedConfigError
from tests.engine.runs import engine_of, make_config
from tests.harness import free_port, run_alone, run_ranks
from tests.models import build, make_batches, rank_share


def test_a_shard_size_that_does_not_divide_the_ranks_is_an_error() -> None:
    with pytest.raises(DeepSpeedConfigError, match="mics_shard_size = 2 does not divide the 1 data-parallel ranks"):
        data_parallel_mesh(shard_size=2)


def test_a_near_size_that_does_not_divide_the_shard_size_is_an_error() -> None:
    with pytest.raises(DeepSpeedConfigError, match="zero_hpz_partition_size = 2 does not divide the 1 ranks"):
        data_parallel_mesh(near_size=2)


def _one_step(engine: deepspeed.DeepSpeedEngine, model: torch.nn.Module, rank: int, world_size: int) -> None:
    ((batch,),) = make_batches(model, num_steps=1, accumulation=1, samples=2 * world_size)  # type: ignore[arg-type]
    engine.backward(engine(*rank_share(batch, rank, world_size)))
    engine.step()


def _num_groups() -> int:
    return len(dist.distributed_c10d._world.pg_map)


def restart(rank: int, world_size: int) -> list[int]:
    """Train, destroy at different times on different ranks, train again; the number of process groups on the way."""
    counts = []
    for _ in range(3):
        model = build("mlp")
        with engine_of(model, make_config(3, micro=2)) as engine:
            _one_step(engine, model, rank, world_size)
            counts.append(_num_groups())
        if rank == 1:
            time.sleep(0.2)
        counts.append(_num_groups())
    return counts


def test_engines_follow_each_other_on_the_same_groups_although_one_rank_is_late_to_destroy() -> None:
    counts, *_ = run_ranks(2, restart)
    assert len(set(counts)) == 1


def share(rank: int, world_size: int) -> tuple[bool, int, int]:
    first, second = build("mlp"), build("mlp")
    with engine_of(second, make_config(2, micro=2)) as outer:
        before = _num_groups()
        with engine_of(first, make_config(2, micro=2)) as inner:
            is_shared = inner.mesh is outer.mesh
        _one_step(outer, second, rank, world_size)
        return is_shared, before, _num_groups()


def agreements(rank: int, world_size: int) -> Any:
    mesh = data_parallel_mesh()
    sent: list[tuple[str, int]] = []
    circle = mesh._circle("job")
    for verb in ("start_largest", "start_gather"):
        inner = getattr(circle, verb)
        setattr(circle, verb, lambda words, inner=inner, verb=verb: (sent.append((verb, len(words))), inner(words))[1])
    same = mesh.agree("job", 7, -3)
    differing = mesh.agree("job", 7, rank)
    begun = mesh.start_agree("job", 1)
    objects = mesh.gather_objects("job", str(rank))
    result = same, differing, begun(), objects, [verb for verb, _ in sent]
    mesh._circles.clear()  # the next engine shares this mesh, and wants one that is not watched
    mesh.release()
    return result


@pytest.mark.parametrize("world_size", [2, 5])
def test_what_all_ranks_say_alike_takes_one_small_message_round_and_what_differs_a_gather(world_size: int) -> None:
    ranks = range(world_size)
    few = ["start_gather"] * 3
    many = ["start_largest", "start_largest", "start_gather", "start_largest"]
    for same, differing, begun, objects, verbs in run_ranks(world_size, agreements):
        assert same == [(7, -3)] * world_size
        assert differing == [(7, rank) for rank in ranks]
        assert (begun, objects) == ([(1,)] * world_size, [str(rank) for rank in ranks])
        assert verbs == (few if world_size <= NUM_TELL_ALL else many)


def test_engines_of_one_shape_share_groups() -> None:
    (is_shared, before, after), *_ = run_ranks(2, share)
    assert is_shared
    assert before == after


def _train(rank: int, world_size: int, stage: int) -> deepspeed.DeepSpeedEngine:
    model = build("mlp")
    engine = deepspeed.initialize(model=model, config=make_config(stage, micro=2))[0]
    _one_step(engine, model, rank, world_size)
    return engine


def lives_on_one_rank_alone(rank: int, world_size: int, how: str) -> None:
    """An engine outlives the others' on rank 0, in one way or another; then all go on with new ones, twice."""
    kept = []
    for stage in (1, 3, 1):
        engine = _train(rank, world_size, stage)
        if rank == 0 and how == "kept":
            kept.append(engine)
        elif rank == 0 and how == "cycle":
            engine.itself = engine
        elif rank == 0 and how == "traceback":
            try:
                raise ValueError(engine)
            except ValueError as error:
                kept.append(error)
        elif how == "destroyed":
            engine.destroy()
        del engine
    for engine in kept:
        getattr(engine, "destroy", lambda: None)()


@pytest.mark.parametrize("how", ["kept", "cycle", "traceback", "destroyed"])
def test_an_engine_that_outlives_the_others_on_one_rank_does_not_disturb_the_next(how: str) -> None:
    run_ranks(2, lives_on_one_rank_alone, how, timeout=50)


def half_made(rank: int, world_size: int) -> bool:
    before = data_parallel_mesh()
    before.group("shard", "reduce")
    if rank == 1:
        del before._groups[before.shape.dims("shard"), "reduce"]
    after = alike_everywhere(before)
    after.group("shard", "reduce")
    dist.barrier(after.group("shard", "reduce"))
    after.release()
    return after is before


def test_groups_that_one_rank_lacks_are_made_anew_on_all() -> None:
    assert run_ranks(2, half_made) == [False, False]


def renewed() -> tuple[bool, bool]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo")
    first = data_parallel_mesh()
    is_kept = data_parallel_mesh() is first
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(free_port())
    dist.init_process_group("gloo")
    return is_kept, data_parallel_mesh() is first


def test_a_mesh_ends_with_the_default_process_group() -> None:
    assert run_alone(renewed) == (True, False)
