"""Parameters that a script has moved into shared memory, or has NumPy arrays of: torch cannot take that memory away again."""

from __future__ import annotations

import itertools

import pytest
import torch

from deepspeed.utils.errors import TrainingStateError
from tests.edits import EngineSide, PlainSide, assert_same, two_sides
from tests.engine.runs import long_but
from tests.harness import run_ranks


def share(side: PlainSide | EngineSide) -> None:
    with side.writing(list(side.module.parameters())):
        side.module.share_memory()


def look(side: PlainSide | EngineSide) -> None:
    with side.writing(list(side.module.parameters())):
        assert all(param.detach().float().numpy().size for param in side.module.parameters())


EDITS = {"share": share, "numpy": look}


def moved(rank: int, world_size: int, edit: str, stage: int, dtype: torch.dtype) -> None:
    with two_sides(rank, world_size, stage, dtype) as sides:
        for side in sides:
            for seed in range(3):
                side.backward(seed)
                side.step()
                EDITS[edit](side)
        assert_same(*sides)


SHORT = [
    ("share", 3, torch.float32, 2), ("share", 3, torch.bfloat16, 2), ("share", 2, torch.bfloat16, 2),
    ("share", 0, torch.float32, 1), ("numpy", 3, torch.float32, 2),
]  # fmt: skip


@pytest.mark.parametrize(
    ("edit", "stage", "dtype", "world_size"),
    long_but(SHORT, itertools.product(EDITS, range(4), (torch.float32, torch.bfloat16), (1, 2))),
)
def test_training_goes_on(edit: str, stage: int, dtype: torch.dtype, world_size: int) -> None:
    run_ranks(world_size, moved, edit, stage, dtype)


def refused(rank: int, world_size: int, stage: int) -> None:
    with two_sides(rank, world_size, stage, torch.bfloat16) as sides:
        for side in sides:
            side.backward(1)
            side.step()
        share(sides[1])
        with pytest.raises(TrainingStateError, match="cannot be given up: the script has shared it"):
            sides[1].engine.offload_states()
        for side in sides:
            side.backward(2)
            side.step()
        assert_same(*sides)


@pytest.mark.parametrize("stage", [1, 2])
def test_shared_memory_is_not_put_away(stage: int) -> None:
    run_ranks(2, refused, stage)
