"""A method that multiplies by itself and is checkpointed: what is recomputed in low precision is what the forward saw."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import deepspeed
from tests.engine.runs import engine_of, long_but, make_config
from tests.harness import run_ranks
from tests.zero.sharded import whole_values

Run = Callable[..., Any]


def _sequential(function: Run, *args: Tensor) -> Tensor:
    return checkpoint_sequential([lambda x: x * 1.0, lambda x: function(x, *args[1:])], 2, args[0], use_reentrant=False)


WAYS: dict[str, Run] = {
    "plain": lambda function, *args: function(*args),
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "saved": functools.partial(checkpoint, use_reentrant=False),
    "ours": deepspeed.checkpointing.checkpoint,
    "sequential": _sequential,
}


class Method(nn.Module):
    """`@`, `F.linear`, `torch.bmm`, `einsum` and a module, in a method of the module."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.weight, self.linear = nn.Parameter(torch.randn(8, 8) / 3), nn.Linear(8, 8)
        self.run = WAYS[way]

    def inner(self, x: Tensor) -> Tensor:
        """[n, 8] -> [n, 8]."""
        y = F.linear(self.linear(x) @ self.weight, self.weight)
        y = torch.bmm(y.unsqueeze(0), self.weight.unsqueeze(0)).squeeze(0)
        return torch.einsum("nd,de->ne", y, self.weight).tanh()

    def forward(self, x: Tensor) -> Tensor:
        """[n, 8] -> [n, 8]."""
        return x + self.run(self.inner, x)


class Closure(Method):
    """The same in a closure over a second tensor, twice, one inside of the other."""

    def forward(self, x: Tensor) -> Tensor:
        """[n, 8] -> [n, 8]."""

        def inner(y: Tensor) -> Tensor:
            return self.run(self.inner, y) @ self.weight

        return x + self.run(inner, x)


class Several(Method):
    """A method of two tensors, whose result is a tuple."""

    def pair(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """A product and a sum."""
        return (x * y) @ self.weight, self.inner(x + y)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 8] -> [n, 8]."""
        a, b = self.run(self.pair, x, x.tanh())
        return a + b


KINDS = {kind.__name__: kind for kind in (Method, Closure, Several)}


class Net(nn.Module):
    """Two of them, between linear layers."""

    def __init__(self, kind: str, way: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(KINDS[kind](way) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """A scalar, fp32."""
        hidden = self.first(x)
        for block in self.blocks:
            hidden = block(hidden)
        return self.last(hidden).float().square().mean()


def trained(rank: int, world_size: int, kind: str, way: str, stage: int, is_plain: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Net(kind, way)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(rank)).bfloat16()
    with engine_of(model, make_config(stage, micro=4, bf16={"enabled": True})) as engine:
        for _ in range(2):
            loss = engine(x)
            if is_plain:
                loss.backward()
            else:
                engine.backward(loss)
            engine.step()
        return whole_values(model)


SHORT = [
    ("Method", "reentrant", 3, False, 2), ("Method", "saved", 1, True, 1), ("Closure", "saved", 3, False, 1),
    ("Closure", "ours", 2, False, 2), ("Several", "ours", 3, True, 1), ("Several", "reentrant", 0, False, 2),
    ("Method", "sequential", 3, True, 2), ("Closure", "reentrant", 0, True, 1),
]  # fmt: skip


CHECKPOINTED = [
    (kind, way)
    for kind, way in itertools.product(KINDS, WAYS)
    if way != "plain" and (kind, way) != ("Several", "sequential")  # which hands on one tensor
]


@pytest.mark.parametrize(
    ("kind", "way", "stage", "is_plain", "world_size"),
    long_but(
        SHORT, ((*each, *rest) for each in CHECKPOINTED for rest in itertools.product(range(4), (False, True), (1, 2)))
    ),
)
def test_recomputing_a_method_changes_no_bit(kind: str, way: str, stage: int, is_plain: bool, world_size: int) -> None:
    (found, *_), (wanted, *_) = (run_ranks(world_size, trained, kind, one, stage, is_plain) for one in (way, "plain"))
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
