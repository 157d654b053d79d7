"""Modules whose backward passes overlap and whose frozen weights share one bucket: adapters on an attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import deepspeed
from tests.harness import run_ranks


class Adapted(nn.Module):
    """A frozen linear layer with a trained product beside it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.down, self.up = nn.Linear(width, 2, bias=False), nn.Linear(2, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Block(nn.Module):
    """Three adapted projections of one input, multiplied."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = Adapted(width), Adapted(width), Adapted(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2), -1) @ self.v(x)


class Model(nn.Module):
    def __init__(self, recompute: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(32) for _ in range(3))
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        for block in self.blocks:
            x = block(x) if self.recompute is None else checkpoint(block, x, use_reentrant=self.recompute)
        return x.square().mean()


def losses(rank: int, world_size: int, recompute: bool | None, plain: bool) -> list[float]:
    model = Model(None if plain else recompute)
    x = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(1))
    if plain:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    else:
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 10},
        }
        trained = [p for p in model.parameters() if p.requires_grad]
        engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
        assert sum(not bucket.requires_grad for bucket in engine._built.sharded) == 1
    found = []
    for _ in range(4):
        loss = model(x.clone()) if plain else engine(x.clone())
        found.append(loss.item())
        if plain:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            engine.backward(loss)
            engine.step()
    return found


@pytest.mark.parametrize("recompute", [None, True, False])
def test_a_frozen_bucket_stays_until_the_last_call_s_backward(recompute: bool | None) -> None:
    expected = run_ranks(2, losses, recompute, True)[0]
    assert run_ranks(2, losses, recompute, False)[0] == pytest.approx(expected, rel=1e-5)
