"""Buffers that are views of parameters show the parameters' values for as long as the engine lives, or are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepspeed.utils.errors import DeepSpeedConfigError
from tests.edits import Net, assert_same, two_sides
from tests.harness import run_ranks


class Aliased(Net):
    """A net that computes with its weights by another name: whole, in part and transposed."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("whole", "row", "turned"):
            self.register_buffer(name, torch.zeros(()))
        self.alias()

    def alias(self) -> None:
        first, second, third = (layer.weight.detach() for layer in self.layers)
        self.whole, self.row, self.turned = first, second[2], third.t()

    def __deepcopy__(self, memo: dict[int, Any]) -> Aliased:
        copy = Aliased()
        for own, other in zip(copy.parameters(), self.parameters(), strict=True):
            own.data.copy_(other)
        return copy

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.first(x) * self.scale
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        hidden = hidden + 0.1 * F.linear(hidden, self.whole) + self.row + hidden @ self.turned
        return F.mse_loss(self.last(hidden).float(), y.float())


def train(rank: int, world_size: int, cases: list[tuple[int, torch.dtype]]) -> None:
    for stage, dtype in cases:
        with two_sides(rank, world_size, stage, dtype, make_model=Aliased) as (plain, side):
            for either in (plain, side):
                for seed in range(4):
                    either.backward(seed)
                    either.step()
                    if seed == 1:  # its bucket gets other memory
                        first = either.module.first.weight
                        with either.writing([first]):
                            first.data = first.data * 0.5
            assert_same(plain, side)
            if dtype is torch.float32:
                assert torch.equal(side.module.row, side.module.layers[1].weight[2])
                if stage in (1, 2):
                    side.engine.offload_states()
                    assert side.module.row.numel() == 0
                    side.engine.reload_states()
                    assert torch.equal(side.module.row, side.module.layers[1].weight[2])


def test_buffers_that_are_views_of_parameters_follow_them() -> None:
    run_ranks(1, train, [(stage, torch.float32) for stage in range(3)])
    run_ranks(2, train, [*((stage, torch.float32) for stage in range(3)), (1, torch.bfloat16), (3, torch.bfloat16)])


def refuse(rank: int, world_size: int) -> None:
    with (
        pytest.raises(
            DeepSpeedConfigError, match=r"whole is a view of the parameter layers\.0\.weight, which lies in pieces"
        ),
        two_sides(rank, world_size, 3, make_model=Aliased),
    ):
        pass


def test_a_view_of_a_parameter_that_is_sharded_is_refused() -> None:
    run_ranks(2, refuse)
