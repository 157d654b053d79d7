"""Parts of a model that TorchScript runs: their parameters come together around calls that Python makes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.utils.errors import DeepSpeedError
from tests.edits import EngineSide, PlainSide, assert_same, sgd
from tests.engine.runs import long_but
from tests.harness import run_ranks

WIDTH = 8


def _block() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.Tanh(), nn.Linear(4 * WIDTH, WIDTH))


def scripted() -> nn.Module:
    return cast(nn.Module, torch.jit.script(_block()))


def traced() -> nn.Module:
    return cast(nn.Module, torch.jit.trace(_block(), torch.randn(2, WIDTH)))


class Blocks(nn.Module):
    """Compiled blocks in a list, one of them called twice, and a head of Python's."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(make() for _ in range(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.first(x)
        for block in [*self.blocks, self.blocks[0]]:
            x = block(x)
        return (self.head(x) - y).pow(2).mean()


class Chain(nn.Module):
    """Compiled blocks in a Sequential."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.chain = nn.Sequential(nn.Linear(6, WIDTH), make(), nn.Tanh(), make(), nn.Linear(WIDTH, 3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return cast(Tensor, (self.chain(x) - y).pow(2).mean())


MODELS = {"blocks": Blocks, "chain": Chain}
MAKES = {"scripted": scripted, "traced": traced}


def trained(rank: int, world_size: int, model: str, make: str, stage: int) -> None:
    made = []
    for _ in range(2):  # torch does not copy compiled modules whose parameters train
        torch.manual_seed(0)
        made.append(MODELS[model](MAKES[make]))
    plain = PlainSide(made[0], sgd, stage, torch.float32, world_size)
    side = EngineSide(made[1], sgd, stage, torch.float32, rank, world_size)
    for seed in range(4):
        for one in (plain, side):
            one.backward(seed)
            one.step()
    assert_same(plain, side)
    side.engine.destroy()


SHORT = [
    ("blocks", "scripted", 3, 2),
    ("chain", "scripted", 3, 1),
    ("chain", "traced", 3, 2),
    ("blocks", "traced", 2, 1),
]


@pytest.mark.parametrize(
    ("model", "make", "stage", "world_size"), long_but(SHORT, itertools.product(MODELS, MAKES, range(4), (1, 2)))
)
def test_they_train_like_any_others(model: str, make: str, stage: int, world_size: int) -> None:
    run_ranks(world_size, trained, model, make, stage)


def whole_model(rank: int, world_size: int) -> None:
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    with pytest.raises(DeepSpeedError, match="takes no hooks that would bring its sharded parameters together"):
        deepspeed.initialize(model=scripted(), config=config)


def test_a_model_that_is_one_script_is_refused_at_stage_3() -> None:
    run_ranks(1, whole_model)
