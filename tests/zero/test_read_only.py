"""Contexts that bring parameters together without a `modifier_rank`: what is written there is gone, and that is told by name."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.utils.logging import logger, warn_once
from tests.edits import EngineSide, Net, PlainSide, assert_same, two_sides
from tests.harness import run_ranks


def scale(param: nn.Parameter) -> None:
    param.data.mul_(0.5)


def assign(param: nn.Parameter) -> None:
    param.data = param.data * 0.5


def on_one_rank(param: nn.Parameter) -> None:
    if torch.distributed.get_rank() == 0:
        with torch.no_grad():
            param.add_(1)


def read(param: nn.Parameter) -> None:
    param.abs().sum().item()


def set_aside(param: nn.Parameter) -> None:
    before = param.data
    param.data = torch.zeros_like(before)
    param.data = before


def write_with_modifier(param: nn.Parameter) -> None:
    with deepspeed.zero.GatheredParameters(param, modifier_rank=0):
        param.data.mul_(0.5)


def set_whole(param: nn.Parameter) -> None:
    whole = deepspeed.utils.safe_get_full_fp32_param(param)
    assert whole is not None
    deepspeed.utils.safe_set_full_fp32_param(param, whole * 0.5)


def told(rank: int, world_size: int, edit: Callable[[nn.Parameter], None], stage: int) -> list[str]:
    """The warnings about a context, of this rank."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    warn_once.cache_clear()
    with two_sides(rank, world_size, stage) as (_, side):
        logger.addHandler(handler)
        param = side.module.get_parameter("first.weight")
        with deepspeed.zero.GatheredParameters([param]):
            edit(param)
        logger.removeHandler(handler)
        side.backward(1)
        side.step()
    return [line for line in lines if "GatheredParameters" in line]


@pytest.mark.parametrize("edit", [scale, assign, on_one_rank])
def test_changes_that_are_discarded_are_told(edit: Callable[[nn.Parameter], None]) -> None:
    lines = run_ranks(2, told, edit, 3)[0]
    assert len(lines) == 1
    assert (
        "GatheredParameters: first.weight was changed inside, and is what it was again" in lines[0]
        and "Give modifier_rank=0" in lines[0]
    )


@pytest.mark.parametrize("edit", [read, set_aside, write_with_modifier, set_whole])
def test_what_is_read_or_kept_is_not(edit: Callable[[nn.Parameter], None]) -> None:
    assert run_ranks(2, told, edit, 3)[0] == []


def test_whole_parameters_are_the_scripts_own() -> None:
    assert run_ranks(2, told, scale, 2)[0] == []


def one_rank_keeps(rank: int, world_size: int, edit: Callable[[nn.Parameter], None], dtype: torch.dtype) -> None:
    with two_sides(rank, world_size, 3, dtype, make_model=Net) as sides:
        for side in sides:
            _train_and_edit(side, edit)
        assert_same(*sides)


def _train_and_edit(side: PlainSide | EngineSide, edit: Callable[[nn.Parameter], None]) -> None:
    for seed in range(3):
        side.backward(seed)
        side.step()
        params = [layer.weight for layer in (side.module.first, *side.module.layers)]
        with deepspeed.zero.GatheredParameters(params):
            edit(params[seed])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("edit", [scale, assign])
def test_one_rank_keeps_what_is_written_and_what_is_assigned(
    edit: Callable[[nn.Parameter], None], dtype: torch.dtype
) -> None:
    run_ranks(1, one_rank_keeps, edit, dtype)
