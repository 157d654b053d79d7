"""The oracle matrix on the simulated device: the bits of the CPU in fp32, whatever the stage."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from tests.engine.runs import EPS, LR, Run, make_config, train
from tests.harness import run_ranks

STAGES = (0, 1, 2, 3)


def config_of(stage: int, *, accumulation: int = 2, clip: float = 0.0, **extra: Any) -> dict[str, Any]:
    """As `make_config`, with torch's AdamW: our own has another kernel on CPUs than on devices."""
    config = make_config(stage, micro=3, accumulation=accumulation, clip=clip, **extra)
    config["optimizer"] = {"type": "AdamW", "params": {"lr": LR, "eps": EPS, "weight_decay": 0.01, "torch_adam": True}}
    return config


@functools.lru_cache(maxsize=None)
def on_cpu(name: str, stage: int, accumulation: int) -> Run:
    """The CPU's run."""
    run: Run = run_ranks(2, train, name, config_of(stage, accumulation=accumulation))[0]
    return run


def assert_same_bits(run: Run, expected: Run) -> None:
    assert run.losses == expected.losses
    assert [name for name in expected.weights if not torch.equal(run.weights[name], expected.weights[name])] == []


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_fp32_has_the_bits_of_the_cpu(stage: int, accumulation: int) -> None:
    run = run_ranks(2, train, "gpt_tied", config_of(stage, accumulation=accumulation), device="sim")[0]
    assert_same_bits(run, on_cpu("gpt_tied", stage, accumulation))
