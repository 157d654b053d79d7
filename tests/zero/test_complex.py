"""Complex parameters, and models that are float64 throughout, train as in plain PyTorch, are saved and are read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state
from deepspeed.utils.errors import DeepSpeedConfigError
from tests.engine.runs import small_units
from tests.harness import run_ranks

STAGES = (0, 1, 2, 3)
CLIP = 0.05


class Spectral(nn.Module):
    """Weights of a Fourier layer between real ones; an odd number of real elements before the complex ones."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        complex_dtype = torch.complex(torch.zeros((), dtype=dtype), torch.zeros((), dtype=dtype)).dtype
        self.inside = nn.Linear(6, 6, dtype=dtype)
        self.scale = nn.Parameter(torch.ones(1, dtype=dtype))
        self.weight = nn.Parameter(torch.randn(3, 4, dtype=complex_dtype))
        self.frozen = nn.Parameter(torch.randn(4, dtype=complex_dtype), requires_grad=False)
        self.out = nn.Linear(6, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.fft.rfft(self.inside(x).tanh())
        hidden = (hidden[:, None, :] * self.weight).sum(1) * self.frozen
        return self.out(torch.fft.irfft(hidden, n=6) * self.scale).pow(2).mean()


def _config(stage: int, **more: Any) -> dict[str, Any]:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, **more.pop("zero", {})}
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": CLIP,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
        "zero_optimization": zero,
        **more,
    }


def _batch(step: int, micro: int, rank: int, dtype: torch.dtype) -> Tensor:
    seed = 100 * step + 10 * micro + rank
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _plain(world_size: int, num_steps: int, dtype: torch.dtype) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Spectral(dtype)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01, weight_decay=0.1)
    for step in range(num_steps):
        optimizer.zero_grad()
        for micro in range(2):
            for rank in range(world_size):
                (model(_batch(step, micro, rank, dtype)) / (2 * world_size)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return model, optimizer


def _train(engine: Any, rank: int, steps: range, dtype: torch.dtype) -> None:
    for step in steps:
        for micro in range(2):
            engine.backward(engine(_batch(step, micro, rank, dtype)))
            engine.step()


def _assert_equal(model: nn.Module, plain: nn.Module, dtype: torch.dtype) -> None:
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 1e-9, "atol": 1e-10}
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert ours.dtype == theirs.dtype, name
            torch.testing.assert_close(ours.detach(), theirs.detach(), **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def trains(rank: int, world_size: int, stage: int, dtype: torch.dtype, zero: dict[str, Any], in_init: bool) -> None:
    plain, optimizer = _plain(world_size, 3, dtype)
    torch.manual_seed(0)
    if in_init:
        with deepspeed.zero.Init(dtype=dtype):
            model = Spectral(dtype)
    else:
        model = Spectral(dtype)
    with small_units():
        engine = deepspeed.initialize(model=model, config=_config(stage, zero=zero))[0]
    _train(engine, rank, range(3), dtype)
    _assert_equal(model, plain, dtype)
    mean = safe_get_full_optimizer_state(model.weight, "exp_avg")
    theirs = dict(plain.named_parameters())["weight"]
    torch.testing.assert_close(mean, optimizer.state[theirs]["exp_avg"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(safe_get_full_fp32_param(model.weight), theirs.detach(), rtol=1e-5, atol=1e-6)
    engine.destroy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_they_train_as_in_plain_pytorch_clipped_and_accumulated(
    stage: int, world_size: int, dtype: torch.dtype
) -> None:
    run_ranks(world_size, trains, stage, dtype, {}, False)


@pytest.mark.parametrize("stage", [1, 3])
def test_offloaded_ones_train_as_in_plain_pytorch(stage: int) -> None:
    run_ranks(2, trains, stage, torch.float32, {"offload_optimizer": {"device": "cpu"}}, False)


def test_ones_made_under_init_train_as_in_plain_pytorch() -> None:
    run_ranks(2, trains, 3, torch.float32, {}, True)


def gradients(rank: int, world_size: int, stage: int) -> None:
    torch.manual_seed(0)
    model = Spectral()
    plain = copy.deepcopy(model)
    config = _config(stage, gradient_accumulation_steps=1, gradient_clipping=0.0)
    engine = deepspeed.initialize(model=model, config=config)[0]
    engine.backward(engine(_batch(0, 0, 0, torch.float32)))
    plain(_batch(0, 0, 0, torch.float32)).backward()
    found = safe_get_full_grad(model.weight)
    torch.testing.assert_close(found, plain.weight.grad, rtol=1e-5, atol=1e-7)
    engine.step()
    engine.destroy()


@pytest.mark.parametrize("stage", STAGES)
def test_their_gradient_is_read_complex(stage: int) -> None:
    run_ranks(2, gradients, stage)


def resumes(rank: int, world_size: int, folder: Path, first: int, second: int, dtype: torch.dtype) -> None:
    plain, _ = _plain(world_size, 4, dtype)
    for stage, steps in ((first, range(2)), (second, range(2, 4))):
        torch.manual_seed(stage)
        model = Spectral(dtype)
        if steps.start == 0:
            torch.manual_seed(0)
            model = Spectral(dtype)
        engine = deepspeed.initialize(model=model, config=_config(stage))[0]
        if steps.start:
            engine.load_checkpoint(str(folder))
        _train(engine, rank, steps, dtype)
        engine.save_checkpoint(str(folder))
        if steps.start:
            _assert_equal(model, plain, dtype)
        engine.destroy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_they_are_saved_and_loaded_at_another_stage(tmp_path: Path, dtype: torch.dtype) -> None:
    run_ranks(2, resumes, tmp_path, 3, 1, dtype)


def low_precision(rank: int, world_size: int) -> None:
    with pytest.raises(
        DeepSpeedConfigError, match=r"weight is complex \(complex64\), which cannot be trained in bfloat16"
    ):
        deepspeed.initialize(model=Spectral(), config=_config(1, bf16={"enabled": True}))


def test_low_precision_is_refused_by_name() -> None:
    run_ranks(1, low_precision)
