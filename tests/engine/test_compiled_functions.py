"""Functions of the script that torch compiles, with the engine's call inside of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.edits import ROWS, assert_same, batch_of, two_sides
from tests.harness import run_ranks


def trained(rank: int, world_size: int, stage: int) -> None:
    with two_sides(rank, world_size, stage) as (plain, side):

        @torch.compile(backend="eager")
        def loss_of(x: Tensor, y: Tensor) -> Tensor:
            return 2 * side.engine(x + 0, y)

        for seed in range(3):
            plain.backward(seed)
            plain.step()
            x, y = (value.split(ROWS // world_size)[rank] for value in batch_of(seed))
            side.engine.backward(loss_of(x, y) / 2)
            side.step()
        assert_same(plain, side)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_loss_function_around_the_engine(stage: int) -> None:
    run_ranks(2, trained, stage)
