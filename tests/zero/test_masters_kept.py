"""Masters of low-precision weights follow what a script writes when they are asked, and weights that are taken away and put back (EMA for an
evaluation, SAM's ascent) leave them as they were, bit by bit: what rounding took from a weight is not lost.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deepspeed.utils import safe_get_full_fp32_param
from tests.edits import EngineSide, two_sides
from tests.harness import run_ranks

CASES = pytest.mark.parametrize(("world_size", "stage"), [(1, 0), (1, 3), (2, 1), (2, 2), (2, 3)])
OFFLOADED: dict[str, Any] = {"offload_optimizer": {"device": "cpu"}}


def masters(side: EngineSide) -> list[Tensor]:
    values = [safe_get_full_fp32_param(param) for param in side.module.parameters()]
    return [value.clone() for value in values if value is not None]


def put_back(rank: int, world_size: int, stage: int, zero: dict[str, Any]) -> None:
    with two_sides(rank, world_size, stage, torch.bfloat16, **zero) as (_, side):
        side.backward(0)
        side.step()
        before, params = masters(side), list(side.module.parameters())
        with side.writing(params):
            kept = [param.detach().clone() for param in params]
            for param in params:
                param.mul_(0.5)
        side.forward(1)
        with side.writing(params):
            for param, value in zip(params, kept, strict=True):
                param.copy_(value)
        assert any(not torch.equal(value, value.bfloat16().float()) for value in before)
        side.engine.optimizer.takeover.follow_written()  # what a step does before it updates
        for value, now in zip(before, masters(side), strict=True):
            assert torch.equal(value, now)


@CASES
@pytest.mark.parametrize("zero", [{}, OFFLOADED], ids=["memory", "offloaded"])
def test_weights_that_are_put_back_leave_their_masters_exact(world_size: int, stage: int, zero: dict[str, Any]) -> None:
    if zero and not stage:
        pytest.skip("states of stage 0 rest on the device")
    run_ranks(world_size, put_back, stage, zero)


def read(rank: int, world_size: int, stage: int) -> None:
    with two_sides(rank, world_size, stage, torch.bfloat16) as (_, side):
        side.backward(0)
        side.step()
        before, params = masters(side), list(side.module.parameters())
        with side.writing(params):
            for param in params:
                param[0] = 0.5
        for value, now in zip(before, masters(side), strict=True):
            assert torch.equal(now[0], torch.full_like(now[0], 0.5))
            assert torch.equal(now[1:], value[1:])


@CASES
def test_a_master_that_is_read_has_what_was_written_into_its_weight(world_size: int, stage: int) -> None:
    run_ranks(world_size, read, stage)
