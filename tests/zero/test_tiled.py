"""A tiled linear layer equals the whole one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.zero import TiledLinear, TiledLinearReturnBias
from deepspeed.zero.tiled import split_sizes
from tests.harness import run_ranks

SPLITS = [(1, 1), (2, 1), (1, 3), (3, 2), (7, 5)]


def test_sizes_differ_by_at_most_one() -> None:
    assert [split_sizes(7, parts) for parts in (1, 2, 3, 7)] == [[7], [4, 3], [3, 2, 2], [1] * 7]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("in_splits", "out_splits"), SPLITS)
def test_forward_and_backward_equal_those_of_the_whole_layer(in_splits: int, out_splits: int, bias: bool) -> None:
    torch.manual_seed(0)
    whole = nn.Linear(7, 5, bias=bias)
    tiled = TiledLinear(7, 5, bias=bias, in_splits=in_splits, out_splits=out_splits, init_linear=whole)
    x, x_tiled = (torch.ones(2, 3, 7).mul_(torch.arange(7)).requires_grad_() for _ in range(2))
    y, y_tiled = whole(x), tiled(x_tiled)
    torch.testing.assert_close(y_tiled, y)
    y.square().sum().backward()
    y_tiled.square().sum().backward()
    torch.testing.assert_close(x_tiled.grad, x.grad)
    rows = [torch.cat([tile.weight.grad for tile in row], dim=1) for row in tiled.linears]  # type: ignore[union-attr]
    torch.testing.assert_close(torch.cat(rows), whole.weight.grad)


def test_split_inputs_and_split_outputs_stay_split() -> None:
    whole = nn.Linear(6, 4)
    tiled = TiledLinear(
        6, 4, in_splits=2, out_splits=2, input_is_already_split=True, combine_out_splits=False, init_linear=whole
    )
    x = torch.randn(2, 6)
    outputs = tiled(x.split(3, dim=-1))
    torch.testing.assert_close(torch.cat(outputs, dim=-1), whole(x))


class ReturnsBias(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        return nn.functional.linear(x, self.weight), self.bias


def test_layers_that_return_their_bias_are_tiled_too() -> None:
    whole = nn.Linear(6, 4)
    tiled = TiledLinearReturnBias(6, 4, in_splits=2, out_splits=2, linear_cls=ReturnsBias, init_linear=whole)
    x = torch.randn(2, 6)
    output, bias = tiled(x)
    torch.testing.assert_close(output + bias, whole(x))


@pytest.mark.parametrize("splits", [0, 8])
def test_splits_outside_of_the_features_are_refused(splits: int) -> None:
    with pytest.raises(RuntimeError, match=rf"in_splits = {splits} is not in \[1, in_features = 7\]"):
        TiledLinear(7, 5, in_splits=splits)
    with pytest.raises(RuntimeError, match=rf"out_splits = {splits} is not in \[1, out_features = 7\]"):
        TiledLinear(5, 7, out_splits=splits)


def copied_into_sharded(rank: int, world_size: int) -> bool:
    whole = nn.Linear(6, 4)
    values = whole.weight.detach().clone()
    deepspeed.zero.Init(module=whole, dtype=torch.float32)
    with deepspeed.zero.Init(dtype=torch.float32):
        tiled = TiledLinear(6, 4, in_splits=2, out_splits=2)
    tiled.copy_params_from(whole)
    with deepspeed.zero.GatheredParameters(tiled.parameters()):
        rows = [torch.cat([tile.weight for tile in row], dim=1) for row in tiled.linears]  # type: ignore[union-attr]
        return torch.equal(torch.cat(rows), values)


def test_a_sharded_layer_is_copied_into_sharded_tiles() -> None:
    assert all(run_ranks(2, copied_into_sharded))
