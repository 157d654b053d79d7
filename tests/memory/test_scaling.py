from __future__ import annotations

import torch
from torch import nn

from deepspeed.memory.estimator import Estimator
from deepspeed.memory.scaling import BatchEstimator, interpolated, resized
from deepspeed.memory.trace import trace_step

BASE = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(3))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return (x - y).pow(2).mean()


def test_every_size_of_the_micro_batch_is_predicted_as_if_it_were_traced() -> None:
    model, batch = Blocks(), (torch.zeros(4, 8, 32), torch.zeros(4, 8, 32))
    scaled = BatchEstimator(model, batch, 4, device_type="cpu")
    for stage, recompute, micro in ((0, "none", 1), (3, "none", 7), (2, "full", 16), (3, "selective", 5)):
        config = {**BASE, "zero_optimization": {"stage": stage}, "activation_checkpointing": {"recompute": recompute}}
        real = Estimator(model, resized(batch, 4, micro), device_type="cpu").estimate(config, world_size=2)
        assert scaled.estimate(config, micro=micro, world_size=2).ledger.by_phase == real.ledger.by_phase
        assert scaled.trace(config, micro).flops.model == 3 * 3 * 2 * micro * 8 * 32 * 64 * 2 - 2 * micro * 8 * 32 * 64


def test_a_bucket_may_be_reduced_again_before_it_was_delivered() -> None:
    """Small buckets and several micro-batches: more fit on the wire than the model has."""
    model, batch = Blocks(), (torch.zeros(4, 8, 32), torch.zeros(4, 8, 32))
    zero = {"stage": 3, "reduce_bucket_size": 4096, "stage3_param_persistence_threshold": 0}
    config = {**BASE, "gradient_accumulation_steps": 2, "zero_optimization": zero}
    estimator = Estimator(model, batch, device_type="cpu")
    once, twice = (estimator.estimate({**config, "gradient_accumulation_steps": n}, world_size=2) for n in (1, 2))
    assert twice.peak_nbytes >= once.peak_nbytes


class Branches(nn.Module):
    """Does more from four samples on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x)
        return (self.layer(x) if len(x) >= 3 else x).mean()


def test_a_model_that_asks_for_its_batch_size_is_traced_at_each() -> None:
    model, batch = Branches(), (torch.zeros(4, 8),)
    low, high = (trace_step(model, resized(batch, 4, size), {}) for size in (2, 3))
    assert interpolated(low, high, (2, 3), 6) is None
    found = BatchEstimator(model, batch, 4, device_type="cpu").estimate(BASE, micro=6)
    assert found.peak_nbytes == Estimator(model, resized(batch, 4, 6), device_type="cpu").estimate(BASE).peak_nbytes
