"""What a model's own code writes into its parameters while it runs, at stage 3 too, where they are there only for so long.

Writing twice is writing once here: plain PyTorch runs the model once for each rank's rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.edits import Net, assert_same, two_sides
from tests.engine.runs import long_but
from tests.harness import run_ranks


class Clamped(nn.Linear):
    """Clips its weight in place, as WGANs do."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(-0.2, 0.2)
        return super().forward(x)


class ClampedData(nn.Linear):
    """The same past torch's counters."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.clamp_(-0.2, 0.2)
        return super().forward(x)


class Assigned(nn.Linear):
    """Is given other data."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = self.weight.data.clamp(-0.2, 0.2)
        return super().forward(x)


class Hooked(nn.Linear):
    """A hook writes before forward."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_forward_pre_hook(lambda module, args: clip(module.weight))


def clip(param: nn.Parameter) -> None:
    param.data.clamp_(-0.1, 0.1)


class Renormed(nn.Module):
    """Rows of an embedding whose norms are bounded; all ranks look all of them up."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.table = nn.Embedding(4, num_out, max_norm=0.5)
        self.inner = nn.Linear(num_in, num_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.table(torch.arange(4, device=x.device)).sum(0)


LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    kind.__name__: kind for kind in (Clamped, ClampedData, Assigned, Hooked, Renormed)
}


def make(layer: str) -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    model.layers = nn.ModuleList(LAYERS[layer](8, 8) for _ in range(2))
    return model


def trained(rank: int, world_size: int, layer: str, stage: int, dtype: torch.dtype) -> None:
    with two_sides(rank, world_size, stage, dtype, make_model=lambda: make(layer)) as sides:
        for side in sides:
            for seed in range(3):
                side.backward(seed)
                side.step()
                side.forward(seed)
        assert_same(*sides)


SHORT = [
    ("Clamped", 3, torch.float32, 2), ("ClampedData", 3, torch.bfloat16, 2), ("Assigned", 3, torch.float32, 2),
    ("Hooked", 3, torch.float32, 2), ("Renormed", 3, torch.float32, 2), ("Assigned", 3, torch.bfloat16, 1),
    ("Renormed", 1, torch.bfloat16, 2),
]  # fmt: skip


@pytest.mark.parametrize(
    ("layer", "stage", "dtype", "world_size"),
    long_but(SHORT, itertools.product(LAYERS, range(4), (torch.float32, torch.bfloat16), (1, 2))),
)
def test_it_stays(layer: str, stage: int, dtype: torch.dtype, world_size: int) -> None:
    run_ranks(world_size, trained, layer, stage, dtype)
