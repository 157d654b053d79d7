"""Tiled equals whole: outputs, losses, and the gradients of inputs and parameters, with what the loss is multiplied by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deepspeed
from deepspeed.runtime.sequence_parallel.ulysses_sp import (
    SequenceTiledCompute,
    TiledFusedLogitsLoss,
    TiledMLP,
    sequence_tiled_compute,
)
from deepspeed.utils import safe_get_full_grad
from deepspeed.utils.errors import DeepSpeedError
from tests.harness import run_ranks
from tests.parallel.sequence.runs import config_of


def mlp() -> nn.Sequential:
    """Three parameters, one frozen."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 6, bias=False))
    made[0].bias.requires_grad_(False)
    return made


def gradients(output: Tensor, x: Tensor, module: nn.Module) -> list[Tensor]:
    """Of x and of the parameters, for some outer gradient."""
    (output * torch.linspace(0.5, 2.0, output.numel()).view(output.shape)).sum().backward()
    return [x.grad.clone(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("shape", [(2, 7, 6), (7, 6)])
@pytest.mark.parametrize("shards", [1, 3, 7, 20])
def test_a_tiled_mlp_equals_the_whole_one(shape: tuple[int, ...], shards: int) -> None:
    found = []
    for is_tiled in (True, False):
        module, x = mlp(), torch.randn(*shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        output = TiledMLP.apply(lambda m, t: m(t), module, x, shards, None) if is_tiled else module(x)
        found.append([output.detach(), *gradients(output, x, module)])
    assert len(found[0]) == len(found[1]) == 4
    for tiled, whole in zip(*found, strict=True):
        torch.testing.assert_close(tiled, whole, rtol=1e-5, atol=1e-6)


def test_dropout_of_a_tile_is_the_same_in_backward() -> None:
    module, x = nn.Dropout(0.5), torch.ones(1, 64, 4, requires_grad=True)
    output = TiledMLP.apply(lambda m, t: m(t), module, x, 4)
    output.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, output.detach())


def loss_fn(module: Any, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the targets that count."""
    return F.cross_entropy(module(x).flatten(0, 1), y.flatten(), ignore_index=-100)


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("shards", [1, 3, 5])
def test_a_tiled_loss_equals_the_whole_one_with_its_outer_factor(shards: int, with_mask: bool) -> None:
    make = torch.Generator().manual_seed(2)
    y = torch.randint(9, (2, 7), generator=make)
    y[:, 2:5] = -100
    found = []
    for is_tiled in (True, False):
        torch.manual_seed(3)
        module = nn.Linear(6, 9)
        x = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
        mask = (y != -100) if with_mask else None
        loss = TiledFusedLogitsLoss.apply(loss_fn, module, x, y, mask, shards) if is_tiled else loss_fn(module, x, y)
        (loss / 4).backward()
        found.append([loss.detach(), x.grad, module.weight.grad, module.bias.grad])
    for tiled, whole in zip(*found, strict=True):
        torch.testing.assert_close(tiled, whole, rtol=1e-5, atol=1e-7)


def masked_mean(module: Any, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """As scripts write it: 0 / 0 where nothing counts."""
    each = F.cross_entropy(module(x).flatten(0, 1), y.flatten().clamp(min=0), reduction="none")
    return (each * mask.flatten()).sum() / mask.float().sum()


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16])
def test_tiles_without_targets_harm_neither_loss_nor_gradients_and_masks_are_counted_exactly(
    dtype: torch.dtype,
) -> None:
    y = torch.randint(9, (1, 900), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(900) >= 301  # 599 targets, which bf16 would count as 600
    found = []
    for tiles in (3, 1):
        torch.manual_seed(3)
        module = nn.Linear(6, 9)
        x = torch.randn(1, 900, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
        loss = TiledFusedLogitsLoss.apply(masked_mean, module, x, y, mask[None].to(dtype), tiles)
        loss.backward()
        found.append([loss.detach(), x.grad, module.weight.grad, module.bias.grad])
    for tiled, whole in zip(*found, strict=True):
        torch.testing.assert_close(tiled, whole, rtol=1e-5, atol=1e-7)


def test_sums_add_up_and_a_loss_without_targets_is_zero() -> None:
    module, x = nn.Linear(6, 9), torch.randn(1, 6, 6, requires_grad=True)
    y = torch.randint(9, (1, 6))

    def summed(m: Any, t: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(m(t).flatten(0, 1), labels.flatten(), reduction="sum")

    loss = TiledFusedLogitsLoss.apply(summed, module, x, y, None, 4, None, "sum")
    torch.testing.assert_close(loss, summed(module, x, y))
    module.zero_grad()
    none = TiledFusedLogitsLoss.apply(loss_fn, module, x, torch.full_like(y, -100), None, 4)
    none.backward()
    assert float(none.detach()) == 0.0
    assert x.grad is not None
    assert not x.grad.any()
    assert [param.grad is not None and not param.grad.any() for param in module.parameters()] == [True, True]


def test_the_general_function_cuts_what_it_is_told_and_passes_the_rest() -> None:
    module, x, scale = mlp(), torch.randn(2, 5, 6, requires_grad=True), torch.rand(2, 5, 1)

    def fn(module: Any, x: Tensor, scale: Tensor) -> Tensor:
        return module(x) * scale

    cut, passed = {"x": x, "scale": scale}, {"module": module}
    one = sequence_tiled_compute(fn, 5, 2, cut, passed, "x", module.parameters(), 1, None)
    two = SequenceTiledCompute.apply(fn, 5, 2, ["x", "scale"], ["module"], "x", None, 1, None, x, scale, module)
    torch.testing.assert_close(one, fn(module, x, scale))
    torch.testing.assert_close(two, one)
    mean = sequence_tiled_compute(lambda x: x.mean(), 5, 2, {"x": x}, {}, "x")
    torch.testing.assert_close(mean, x.mean())


def test_what_cannot_be_tiled_is_refused_by_name() -> None:
    x = torch.zeros(1, 4, 2)
    with pytest.raises(DeepSpeedError, match="shards = 0"):
        TiledMLP.apply(lambda m, t: t, None, x, 0)
    with pytest.raises(DeepSpeedError, match="'y' is not in kwargs_to_shard"):
        sequence_tiled_compute(lambda x: x, 4, 2, {"x": x}, {}, "y")
    with pytest.raises(DeepSpeedError, match="seqlen = 5"):
        sequence_tiled_compute(lambda x: x, 5, 2, {"x": x}, {}, "x")
    with pytest.raises(DeepSpeedError, match=r"y is \(1, 3\)"):
        TiledFusedLogitsLoss.apply(loss_fn, None, x, torch.zeros(1, 3), None, 2)
    with pytest.raises(DeepSpeedError, match=r"A tile of 2 tokens gave a tensor of shape \(1, 1, 2\), not \(1, 2, 2\)"):
        TiledMLP.apply(lambda m, t: t[:, :1], None, x, 2)


class Tiled(nn.Module):
    """An MLP and a head with its loss, tiled or not."""

    def __init__(self, is_tiled: bool) -> None:
        super().__init__()
        self.mlp, self.head, self.is_tiled = mlp(), nn.Linear(6, 9), is_tiled

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.is_tiled:
            return loss_fn(self.head, self.mlp(x), y)
        x = TiledMLP.apply(lambda m, t: m(t), self.mlp, x, 3)
        return TiledFusedLogitsLoss.apply(
            lambda m, t, y: loss_fn(m.head, t, y), self, x, y, None, 3, self.head.parameters()
        )


def train(rank: int, world: int, stage: int) -> list[tuple[float, list[Tensor]]]:
    """Loss and reduced gradients of two micro-batches, tiled and not; how often gradients were reduced."""
    found = []
    for is_tiled in (True, False):
        torch.manual_seed(7)
        engine, *_ = deepspeed.initialize(model=Tiled(is_tiled), config=config_of(stage, gradient_accumulation_steps=2))
        for micro in range(2):
            make = torch.Generator().manual_seed(10 * rank + micro)
            x, y = torch.randn(1, 7, 6, generator=make), torch.randint(9, (1, 7), generator=make)
            loss = engine(x, y)
            engine.backward(loss)
            if micro:
                grads = [safe_get_full_grad(p).clone() for p in engine.module.parameters() if p.requires_grad]
            engine.step()
        found.append((float(loss.detach()), grads))
        engine.destroy()
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_under_zero_tiled_equals_whole(stage: int) -> None:
    for (tiled_loss, tiled), (loss, whole) in run_ranks(2, train, stage):
        assert tiled_loss == pytest.approx(loss, rel=1e-6)
        for a, b in zip(tiled, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


class Tied(nn.Module):
    """A head with its embedding's weight, which the script's own tiled function uses: by calling it, or the weight alone."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.words, self.mlp, self.head = nn.Embedding(9, 6), mlp(), nn.Linear(6, 9, bias=False)
        self.head.weight = self.words.weight

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Of some tokens."""
        logits = self.head(x) if self.way != "weight" else F.linear(x, self.head.weight)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum")

    def forward(self, ids: Tensor) -> Tensor:
        x = self.mlp(self.words(ids))
        if self.way == "whole":
            return self.loss(x, ids)
        cut = {"x": x, "y": ids}
        params = [self.head.weight]
        return sequence_tiled_compute(self.loss, ids.shape[1], 3, cut, {}, "x", params, output_reduction="sum")


def train_tied(rank: int, world: int, stage: int) -> list[tuple[float, list[Tensor]]]:
    """Loss and reduced gradients, whole and tiled in two ways."""
    found = []
    for way in ("whole", "called", "weight"):
        torch.manual_seed(7)
        engine, *_ = deepspeed.initialize(model=Tied(way), config=config_of(stage))
        for step in range(2):
            loss = engine(torch.randint(9, (1, 7), generator=torch.Generator().manual_seed(10 * rank + step)))
            engine.backward(loss)
            grads = [safe_get_full_grad(p).clone() for p in engine.module.parameters() if p.requires_grad]
            engine.step()
        found.append((float(loss.detach()), grads))
        engine.destroy()
    return found


@pytest.mark.parametrize("stage", [1, 3])
def test_a_tied_weight_that_only_the_script_s_tiles_use_equals_whole(stage: int) -> None:
    for (loss, whole), *others in run_ranks(2, train_tied, stage):
        for tiled_loss, tiled in others:
            assert tiled_loss == pytest.approx(loss, rel=1e-6)
            for a, b in zip(tiled, whole, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
