"""The planner's bytes beside those that engines count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.planner.traffic import step_traffic
from deepspeed.utils.waits import COMMUNICATION
from tests.harness import run_ranks


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(33, 128)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128)) for _ in range(3)
        )
        self.leave = nn.Linear(128, 7)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = x + block(x)
        return (self.leave(x) - y).pow(2).mean()


def batch(config: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
    return torch.ones(2, 33, dtype=dtype), torch.ones(2, 7, dtype=dtype)


def counted(rank: int, world_size: int, configs: list[dict[str, Any]]) -> list[dict[str, int]]:
    found = []
    for config in configs:
        engine = deepspeed.initialize(model=Stack(), config=config)[0]
        for step in range(6):
            if step == 5:
                before = dict(COMMUNICATION.nbytes)
            for _ in range(config["gradient_accumulation_steps"]):
                engine.backward(engine(*batch(config)))
                engine.step()
        now = COMMUNICATION.nbytes
        ops = ("zero.all_gather", "zero.reduce_scatter", "zero.all_reduce")
        found.append({op: n for op in ops if (n := now.get(op, 0) - before.get(op, 0))})
        engine.destroy()
    return found


def config(stage: int, accumulation: int, dtype: str, **zero: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "bf16": {"enabled": dtype == "bf16"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 50_000, **zero},
    }


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_the_bytes_of_a_step_are_those_that_the_engine_counts(num_ranks: int) -> None:
    configs = [config(stage, 2, "fp32") for stage in range(4)]
    configs += [
        config(3, 1, "bf16", stage3_param_persistence_threshold=0, stage3_max_reuse_distance=0),
        config(2, 3, "bf16"),
    ]
    if num_ranks == 3:
        configs = configs[2:]
    predicted = [step_traffic(Stack(), each, batch(each), world_size=num_ranks) for each in configs]
    for counts in run_ranks(num_ranks, counted, configs):
        assert counts == predicted
