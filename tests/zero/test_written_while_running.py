"""What a model's own code writes into its parameters while it runs, at stage 3 too, where they are there only for so long.

Writing twice is writing once here: plain PyTorch runs the model once for each rank's rows.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.utils.logging import logger, warn_once
from deepspeed.zero import takeover
from deepspeed.zero.facts import TREE_EVERY
from tests.edits import Net, assert_same, batch_of, two_sides
from tests.engine.runs import engine_of, long_but
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


def told_nothing(rank: int, world_size: int) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    with two_sides(rank, world_size, 3, make_model=lambda: make("Assigned")) as (plain, side):
        for one in (plain, side):
            one.forward(0)
        warn_once.cache_clear()
        logger.addHandler(handler)
        assert_same(plain, side)  # in a context
        logger.removeHandler(handler)
    assert lines == []


def test_it_stays_where_a_context_follows_the_call() -> None:
    run_ranks(2, told_nothing)


def kept_until_the_step(rank: int, world_size: int) -> None:
    """A second derivative keeps parameters whole until the step, whose update comes after what the model wrote."""
    plain, sharded = make("Clamped"), make("Clamped")
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    with engine_of(sharded, config) as engine:
        for seed in range(3):
            x, y = batch_of(seed)
            x.requires_grad_()
            for model in (plain, engine):
                loss = model(x, y)
                (slope,) = torch.autograd.grad(loss, x, create_graph=True)
                (engine.backward if model is engine else torch.Tensor.backward)(loss + slope.square().sum())
            optimizer.step()
            optimizer.zero_grad()
            engine.step()
        with deepspeed.zero.GatheredParameters(list(sharded.parameters())):
            for want, got in zip(plain.parameters(), sharded.parameters(), strict=True):
                torch.testing.assert_close(got.detach(), want.detach())


def test_it_stays_where_parameters_are_kept_until_the_step() -> None:
    run_ranks(2, kept_until_the_step)


def saved(rank: int, world_size: int, folder: str) -> None:
    with two_sides(rank, world_size, 3, make_model=lambda: make("Clamped")) as (_, side):
        weight = side.module.layers[0].weight
        side.forward(0)
        side.engine.save_checkpoint(folder)
        side.engine.load_checkpoint(folder)
        whole = deepspeed.utils.safe_get_full_fp32_param(weight)
        assert whole is not None and float(whole.abs().max()) == pytest.approx(0.2)


def test_it_is_saved_right_after_the_call(tmp_path: Path) -> None:
    run_ranks(2, saved, str(tmp_path))


class Unlike(nn.Linear):
    """Writes once or in every call, on some ranks or on all; `writes` is told the layer and the rank."""

    writes: Callable[[nn.Linear, int], None]

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            Unlike.writes(self, torch.distributed.get_rank())
        return super().forward(x)


def by_rank(layer: nn.Linear, rank: int) -> None:
    layer.weight.clamp_(-0.2 - 0.01 * rank, 0.2)


def alone(layer: nn.Linear, rank: int) -> None:
    if rank == 1:
        layer.weight[0].clamp_(-0.1, 0.1)  # a row of rank 0's part


def alone_through_data(layer: nn.Linear, rank: int) -> None:
    if rank == 1:
        layer.weight.data[0].clamp_(-0.1, 0.1)


def assigned_by_rank(layer: nn.Linear, rank: int) -> None:
    layer.weight.data = layer.weight.data.clamp(-0.2 - 0.01 * rank, 0.2)


def first_by_rank(layer: nn.Linear, rank: int) -> None:
    """As initialisation by the first batch."""
    if not hasattr(layer, "is_ready"):
        layer.weight.fill_(rank + 0.5)
        layer.is_ready = True


def alike(layer: nn.Linear, rank: int) -> None:
    layer.weight.data.clamp_(-0.2, 0.2)
    layer.bias.mul_(0.9)


def only_read(layer: nn.Linear, rank: int) -> None:
    """As somebody logs who logs on one rank."""
    if rank == 0:
        layer.weight.data.norm()


def write_between(module: nn.Module) -> None:
    with deepspeed.zero.GatheredParameters(list(module.parameters()), modifier_rank=0):
        if torch.distributed.get_rank() == 0:
            for param in module.parameters():
                param.data.mul_(1.01)


def told(
    rank: int, world_size: int, writes: Callable[[nn.Linear, int], None], dtype: torch.dtype, is_told: bool
) -> None:
    LAYERS["Unlike"], Unlike.writes = Unlike, staticmethod(writes)  # type: ignore[method-assign]
    lines: list[str] = []
    with (
        two_sides(rank, world_size, 3, dtype, make_model=lambda: make("Unlike")) as (_, side),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(takeover, "warn_once", lines.append)
        for seed in range(2 * TREE_EVERY):
            side.backward(seed)
            side.step()
            if seed % 5 == 0:
                write_between(side.module)
    assert bool(lines) == is_told
    if is_told:
        assert (
            lines[0].startswith("layers.0.") and "rank 1 writes something else than rank 0 (ZeRO stage 3)" in lines[0]
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("writes", [by_rank, alone, alone_through_data, assigned_by_rank, first_by_rank])
def test_ranks_that_write_something_else_are_told(writes: Callable[[nn.Linear, int], None], dtype: torch.dtype) -> None:
    run_ranks(2, told, writes, dtype, True)


@pytest.mark.parametrize("writes", [alike, only_read])
def test_ranks_that_write_the_same_or_read_are_not(writes: Callable[[nn.Linear, int], None]) -> None:
    run_ranks(2, told, writes, torch.float32, False)
