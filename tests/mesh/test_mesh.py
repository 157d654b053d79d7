"""The life of a mesh's groups: made at first use, shared by engines, destroyed with the last one."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

import deepspeed
from deepspeed.mesh import data_parallel_mesh
from deepspeed.mesh.mesh import NUM_TELL_ALL
from deepspeed.utils.errors import DeepSpeedConfigError
from tests.engine.runs import engine_of, make_config
from tests.harness import run_ranks
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


def restart(rank: int, world_size: int) -> list[int]:
    """Train, destroy at different times on different ranks, train again; the number of process groups on the way."""
    counts = [len(dist.distributed_c10d._world.pg_map)]
    for _ in range(3):
        model = build("mlp")
        with engine_of(model, make_config(3, micro=2)) as engine:
            _one_step(engine, model, rank, world_size)
            counts.append(len(dist.distributed_c10d._world.pg_map))
        if rank == 1:
            time.sleep(0.2)
        counts.append(len(dist.distributed_c10d._world.pg_map))
    return counts


def test_engines_follow_each_other_although_one_rank_is_late_to_destroy() -> None:
    counts, *_ = run_ranks(2, restart)
    assert counts[2] == counts[4] == counts[6] == counts[0]
    assert counts[1] == counts[3] == counts[5] > counts[0]


def share(rank: int, world_size: int) -> list[int]:
    counts = [len(dist.distributed_c10d._world.pg_map)]
    first, second = build("mlp"), build("mlp")
    with engine_of(second, make_config(2, micro=2)) as outer:
        counts.append(len(dist.distributed_c10d._world.pg_map))
        with engine_of(first, make_config(2, micro=2)):
            counts.append(len(dist.distributed_c10d._world.pg_map))
        _one_step(outer, second, rank, world_size)
    return [*counts, len(dist.distributed_c10d._world.pg_map)]


def test_engines_share_groups_and_the_last_one_destroys_them() -> None:
    (before, one, two, after), *_ = run_ranks(2, share)
    assert before == after < one == two


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
    mesh.release()
    return same, differing, begun(), objects, [verb for verb, _ in sent]


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
