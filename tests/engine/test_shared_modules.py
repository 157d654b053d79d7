"""Models that share a part: one live engine has it; the next may when that one has ended, and goes on from its weights."""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.utils.errors import DeepSpeedError
from tests.engine.runs import long_but, small_units
from tests.harness import run_ranks
from tests.zero.sharded import whole_values

ROWS = 4


class Pair(nn.Module):
    """A part that is shared, and one's own."""

    def __init__(self, shared: nn.Module, own: nn.Module) -> None:
        super().__init__()
        self.shared, self.own = shared, own

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The mean square of the output."""
        return self.own(self.shared(x)).float().square().mean()


def encoder() -> list[nn.Module]:
    """Two heads on one encoder."""
    shared = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    return [Pair(shared, nn.Linear(6, 3)), Pair(shared, nn.Linear(6, 1))]


def weight() -> list[nn.Module]:
    """Two models that tie one weight."""
    models = [Pair(nn.Linear(6, 6), nn.Linear(6, 3)) for _ in range(2)]
    models[1].shared.weight = models[0].shared.weight  # type: ignore[union-attr]
    return models


def frozen() -> list[nn.Module]:
    """Two heads on one frozen backbone."""
    shared = nn.Linear(6, 6).requires_grad_(False)
    return [Pair(shared, nn.Linear(6, 3)), Pair(shared, nn.Linear(6, 2))]


def frozen_in_one() -> list[nn.Module]:
    """The second trains what the first only reads, and the other way round."""
    a, b = nn.Linear(6, 6), nn.Linear(6, 6)
    return [Pair(nn.Sequential(a, b), nn.Linear(6, 3)), Pair(nn.Sequential(b, a), nn.Linear(6, 2))]


def normed() -> list[nn.Module]:
    """What is shared has buffers that a forward writes."""
    shared = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, momentum=0.5))
    return [Pair(shared, nn.Linear(6, 3)), Pair(shared, nn.Linear(6, 1))]


MODELS: dict[str, Callable[[], list[nn.Module]]] = {
    f.__name__: f for f in (encoder, weight, frozen, frozen_in_one, normed)
}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def an_engine(model: nn.Module, stage: int, world_size: int) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": ROWS // world_size,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 50},
    }
    with small_units():
        return deepspeed.initialize(model=model, optimizer=sgd(model), config=config)[0]


class Plain:
    """A model in plain PyTorch, with an optimizer for as long as an engine would live."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._optimizer = model, sgd(model)

    def train(self, x: torch.Tensor) -> None:
        """Two steps."""
        for _ in range(2):
            self._model(x).backward()
            self._optimizer.step()
            self._optimizer.zero_grad()


def train(engine: Any, x: torch.Tensor) -> None:
    for _ in range(2):
        engine.backward(engine(x))
        engine.step()


def assert_like(model: nn.Module, plain: nn.Module) -> None:
    values = whole_values(model)
    for name, param in plain.named_parameters():
        torch.testing.assert_close(values[name], param.detach(), rtol=1e-5, atol=1e-6, msg=name)
    for (name, buffer), expected in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, msg=name)


def in_turns(rank: int, world_size: int, name: str, stages: tuple[int, int], by_destroy: bool) -> None:
    torch.manual_seed(0)
    models = MODELS[name]()
    plain_models = copy.deepcopy(models)
    x = torch.randn(ROWS // world_size, 6)  # the same on all ranks, whose average is then that of one
    for turn in (0, 1, 0):
        plain = Plain(plain_models[turn])
        engine = an_engine(models[turn], stages[turn], world_size)
        train(engine, x)
        plain.train(x)
        if name == "frozen" and stages[turn] < 3:  # frozen parameters are in nobody's bucket there
            other, other_plain = (
                an_engine(models[1 - turn], stages[1 - turn], world_size),
                Plain(plain_models[1 - turn]),
            )
            train(other, x)
            other_plain.train(x)
        else:
            other = None
            with pytest.raises(DeepSpeedError, match="belong to another live engine"):
                an_engine(models[1 - turn], stages[1 - turn], world_size)
        train(engine, x)  # neither a refusal nor another engine has changed anything here
        plain.train(x)
        if by_destroy:
            engine.destroy()
        del engine, other
        gc.collect()
        assert_like(models[turn], plain_models[turn])


STAGES = [(1, 3), (3, 0), (2, 2), (0, 1), (3, 3)]
SHORT = [(name, STAGES[i], i % 2 > 0, 1 + i % 2) for i, name in enumerate(MODELS)]


@pytest.mark.parametrize(
    ("name", "stages", "by_destroy", "world_size"),
    long_but(SHORT, itertools.product(MODELS, itertools.product(range(4), repeat=2), (True, False), (1, 2))),
)
def test_two_models_train_in_turns(name: str, stages: tuple[int, int], by_destroy: bool, world_size: int) -> None:
    run_ranks(world_size, in_turns, name, stages, by_destroy)
