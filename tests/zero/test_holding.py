"""A bucket of many small modules is held a piece at a time: each call may use its own parameters, and a use of others is noticed."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.zero.param import ShardedParameter, ZeroParameter, slot_of
from tests.engine.runs import make_config
from tests.harness import run_ranks

ALL_SHARDED = {"stage3_param_persistence_threshold": 0}


@contextlib.contextmanager
def large_units(model: nn.Module, config: dict[str, Any]) -> Iterator[Any]:
    """An engine whose small modules share a bucket, as they do outside of tests."""
    engine, *_ = deepspeed.initialize(model=model, config=config)
    try:
        yield engine
    finally:
        engine.destroy()


class Neighbours(nn.Module):
    """Two small layers of one bucket; the second call uses the first one's weight as well, after its call and before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), Borrower(), nn.Linear(4, 4)])
        self.layers[1].lender = [self.layers[0]]

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.layers[2].weight
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return (x + x @ self.layers[0].weight).square().mean()


class Borrower(nn.Linear):
    """Uses another's weight beside its own."""

    lender: list[nn.Linear]

    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + nn.functional.linear(x, self.lender[0].weight)


def train(rank: int, world_size: int) -> list[list[float]]:
    torch.manual_seed(0)
    model = Neighbours()
    plain = copy.deepcopy(model)
    plain.layers[1].lender = [plain.layers[0]]
    model.layers[1].lender = [model.layers[0]]
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    losses: list[list[float]] = [[], []]
    config = make_config(3, micro=2, zero=ALL_SHARDED, optimizer={"type": "SGD", "params": {"lr": 0.5}})
    with large_units(model, config) as engine:
        buckets = {slot.bucket for p in model.parameters() if (slot := slot_of(p))}
        assert len(buckets) == 1, f"they share a bucket: {buckets}"
        for step in range(4):
            x = torch.randn(2, 4, generator=torch.Generator().manual_seed(step))
            plain_loss, loss = plain(x), engine(x)
            plain_loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            engine.backward(loss)
            engine.step()
            losses[0].append(plain_loss.item())
            losses[1].append(loss.item())
    return losses


@pytest.mark.parametrize("world_size", [1, 2])
def test_layers_of_one_bucket_may_use_each_others_weights(world_size: int) -> None:
    for expected, found in run_ranks(world_size, train):
        assert found == pytest.approx(expected, rel=1e-6)


def hold_and_unhold(rank: int, world_size: int) -> list[list[bool]]:
    """After each act, which of the bucket's first two parameters may be used freely."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with large_units(model, make_config(3, micro=2, zero=ALL_SHARDED)):
        one, other = model[0].weight, model[1].weight
        slot: Any = slot_of(one)
        bucket = slot.bucket
        acts: list[Any] = [
            lambda: bucket.hold([one]),
            lambda: bucket.hold([other]),
            lambda: bucket.unhold([one]),
            lambda: bucket.hold(),
            lambda: bucket.unhold([other]),
            lambda: bucket.hold([one]),
            lambda: bucket.unhold(),
            lambda: bucket.unhold([one]),
        ]
        bucket.start_unshard()
        bucket.finish_unshard()
        seen = []
        for act in acts:
            act()
            assert {type(one), type(other)} <= {ZeroParameter, ShardedParameter}
            seen.append([type(one) is ZeroParameter, type(other) is ZeroParameter])
        bucket.reshard()
    return seen


def test_what_is_held_is_what_somebody_holds() -> None:
    y, n = True, False
    expected = [[y, n], [y, y], [n, y], [y, y], [y, y], [y, y], [y, n], [n, n]]
    assert run_ranks(2, hold_and_unhold) == [expected] * 2
