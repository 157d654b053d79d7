"""Inference mode before, between and after training steps leaves nothing behind that training cannot use."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

import deepspeed
from tests.engine.runs import engine_of, make_config
from tests.harness import run_ranks
from tests.models import build, make_batches, rank_share
from tests.zero.sharded import ROWS, sharded_engine, step, whole_values


def evaluate(engine: Any, rank: int, world_size: int) -> None:
    ((batch,),) = make_batches(engine.module, num_steps=1, accumulation=1, samples=ROWS, seed=5)
    dtype = engine.get_data_types()[0]
    engine(*(t.to(dtype) for t in rank_share(batch, rank, world_size)))


def keep_state_dict(engine: Any, rank: int, world_size: int) -> Any:
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return engine.module.state_dict()


def keep_views(engine: Any, rank: int, world_size: int) -> Any:
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return [param[:1] for param in engine.module.parameters()]


def write(engine: Any, rank: int, world_size: int) -> None:
    for param in engine.module.parameters():
        with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
            param.data.mul_(1.0)


def gather_only(engine: Any, rank: int, world_size: int) -> None:
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        evaluate(engine, rank, world_size)


BETWEEN = {f.__name__: f for f in (evaluate, keep_state_dict, keep_views, write, gather_only)}


def train_around(rank: int, world_size: int, stage: int, what: str, mode: str, extra: dict[str, Any]) -> Any:
    modes = {"inference": torch.inference_mode, "no_grad": torch.no_grad}
    with sharded_engine(rank, world_size, stage, **extra) as engine:
        kept = []
        for i in range(4):
            with modes[mode]():
                kept.append(BETWEEN[what](engine, rank, world_size))
            if i < 3:
                step(engine, rank, world_size, seed=i)
        return {name: value.float() for name, value in whole_values(engine.module).items()}


@pytest.mark.quick("3-extra0-*", "[12]-extra2-*")
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("what", sorted(BETWEEN))
@pytest.mark.parametrize(("stage", "extra"), [(3, {}), (3, {"bf16": {"enabled": True}}), (1, {})])
def test_training_around_inference_mode_is_training_around_no_grad(
    stage: int, what: str, world_size: int, extra: dict[str, Any]
) -> None:
    found = run_ranks(world_size, train_around, stage, what, "inference", extra)[0]
    expected = run_ranks(world_size, train_around, stage, what, "no_grad", extra)[0]
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def built_inside(rank: int, world_size: int, stage: int) -> Any:
    model = build("mlp")
    with contextlib.ExitStack() as stack:
        with torch.inference_mode():
            engine = stack.enter_context(engine_of(model, make_config(stage, micro=ROWS // world_size)))
            evaluate(engine, rank, world_size)
        return step(engine, rank, world_size), step(engine, rank, world_size)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_engine_built_in_inference_mode_trains_outside_of_it(stage: int) -> None:
    first, second = run_ranks(2, built_inside, stage)[0]
    assert second < first
