"""Custom autograd functions that are given a parameter of another module, which is sharded when they are called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import utils

from tests.edits import Net, assert_same, two_sides
from tests.harness import run_ranks


class Doubled(torch.autograd.Function):
    """Saves nothing."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * 2


class FusedHead(torch.autograd.Function):
    """Product and loss, with what it needs kept as attributes."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
        ctx.hidden, ctx.weight = hidden, weight
        ctx.error = (hidden @ weight.t() + bias).float() - y.float()
        return ctx.error.square().mean()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        error = (gradient * 2 / ctx.error.numel() * ctx.error).to(ctx.hidden.dtype)
        return error @ ctx.weight, error.t() @ ctx.hidden, error.sum(0), None


fused_head = FusedHead.apply


class WithFunction(Net):
    """The head's parameters are used outside of it."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.first(x) * self.scale
        for layer in self.layers:
            hidden = hidden + torch.tanh(F.linear(hidden, Doubled.apply(layer.weight), layer.bias))
        return fused_head(hidden, self.last.weight, self.last.bias, y)


def same(rank: int, world_size: int, dtype: torch.dtype) -> None:
    before = utils.unwrap_dead_wrappers
    with two_sides(rank, world_size, 3, dtype, make_model=WithFunction) as sides:
        for side in sides:
            for seed in range(3):
                side.backward(seed)
                side.step()
                side.forward(seed)
        assert_same(*sides)
    assert utils.unwrap_dead_wrappers is before


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_custom_function_may_be_given_a_parameter_of_another_module(dtype: torch.dtype, world_size: int) -> None:
    run_ranks(world_size, same, dtype)
