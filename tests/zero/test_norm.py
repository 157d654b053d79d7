"""The gradient norm over ranks that share a model: what `torch.nn.utils.clip_grad_norm_` gives for the whole of it."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspeed.zero.gradients import norm_of
from tests.engine.runs import engine_of, make_config
from tests.harness import run_ranks

CLIP = 1.0


class HalfOfALinear(nn.Module):
    """Rank r holds rows 2r and 2r + 1 of a Linear of 4 outputs, and the whole of the bias that is added to all of them."""

    def __init__(self, rank: int, scale: float) -> None:
        super().__init__()
        whole = torch.arange(12.0).view(4, 3) / 10
        self.rows = nn.Parameter(whole[2 * rank : 2 * rank + 2].clone())
        self.rows.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.shift = nn.Parameter(torch.ones(3))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        mine = self.scale * (x + self.shift) @ self.rows.t()
        return mine.sum()


class ModelParallel:
    """An mpu of one data-parallel rank and as many model-parallel ones as there are ranks."""

    def __init__(self, rank: int, world_size: int) -> None:
        alone = [dist.new_group([i]) for i in range(world_size)]
        self._alone, self._all = alone[rank], dist.new_group(list(range(world_size)))

    def close(self) -> None:
        for group in (self._alone, self._all):
            dist.destroy_process_group(group)

    def get_data_parallel_group(self) -> Any:
        return self._alone

    def get_model_parallel_group(self) -> Any:
        return self._all

    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_world_size(self) -> int:
        return 1

    def get_data_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size()

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank()


def half_a_step(
    rank: int, world_size: int, stage: int, overflows_on: int | None
) -> tuple[float, bool, dict[str, Tensor]]:
    precision = {"fp16": {"enabled": True, "initial_scale_power": 4}} if overflows_on is not None else {}
    model = HalfOfALinear(rank, scale=100.0 if rank else 1.0)
    mpu = ModelParallel(rank, world_size)
    config = make_config(stage, micro=1, clip=CLIP, optimizer={"type": "SGD", "params": {"lr": 1.0}}, **precision)
    with engine_of(model, config, mpu=mpu) as engine, contextlib.closing(mpu):
        x = torch.full((1, 3), 2.0, dtype=next(model.parameters()).dtype)
        loss = engine(x)
        # What a tensor-parallel layer's backward does: the repeated parameter's gradient is the sum over ranks.
        model.shift.register_hook(lambda gradient: _summed(gradient))
        if overflows_on == rank:
            loss = loss * float("inf")
        engine.backward(loss)
        engine.step()
        weights = {name: param.detach().float().clone() for name, param in model.named_parameters() if param.numel()}
        return engine.get_global_grad_norm() or 0.0, engine.skipped_steps > 0, weights


def _summed(gradient: Tensor) -> Tensor:
    total = gradient.float().clone()
    dist.all_reduce(total)
    return total.to(gradient.dtype)


def plain_step() -> tuple[float, dict[int, dict[str, Tensor]]]:
    """The same in one process, with both halves."""
    halves = [HalfOfALinear(rank, scale=100.0 if rank else 1.0) for rank in range(2)]
    halves[1].shift = halves[0].shift
    params = [halves[0].shift, halves[0].rows, halves[1].rows]
    sum(half(torch.full((1, 3), 2.0)) for half in halves).backward()
    norm = nn.utils.clip_grad_norm_(params, CLIP)
    torch.optim.SGD(params, lr=1.0).step()
    return norm.item(), {
        rank: {name: param.detach().clone() for name, param in half.named_parameters()}
        for rank, half in enumerate(halves)
    }


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_with_cut_weights_norm_and_clipping_are_those_of_the_whole_model(stage: int) -> None:
    norm, weights = plain_step()
    for rank, (found, skipped, mine) in enumerate(run_ranks(2, half_a_step, stage, None)):
        assert found == pytest.approx(norm, rel=1e-6) and not skipped
        for name, value in mine.items():
            torch.testing.assert_close(value, weights[rank][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_of_one_model_skip_a_step_together(stage: int, rank: int) -> None:
    assert [skipped for _, skipped, _ in run_ranks(2, half_a_step, stage, rank)] == [True, True]


@pytest.mark.parametrize("numel", [0, 1, 1023, 2048, 40_001, 8_000_003])
def test_a_norm_has_the_digits_of_fp32_however_many_elements_there_are(numel: int) -> None:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    assert float(norm_of(values)) == pytest.approx(float(values.double().norm()), rel=2e-7)
