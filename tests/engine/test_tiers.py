"""Training with bytes at rest on the cpu and nvme tiers: the same numbers as without, on every tier that exists."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspeed.ops.adam import DeepSpeedCPUAdam
from tests.engine.runs import EPS, LR, make_config, train
from tests.engine.test_equals_plain_pytorch import SAMPLES, assert_equals, oracle
from tests.harness import run_ranks

TILE = 1 << 11
"""Elements of the smallest tile, so that the test models' shards are cut into many."""

OPTIMIZER_TIERS = {1: ["cpu"], 2: ["cpu"], 3: ["none", "cpu", "nvme"]}
COMBINATIONS = [
    (stage, optimizer, param)
    for stage, tiers in OPTIMIZER_TIERS.items()
    for optimizer in tiers
    for param in (["none", "cpu", "nvme"] if stage == 3 else ["none"])
    if (optimizer, param) != ("none", "none")
]


def offloaded(stage: int, optimizer: str, param: str, path: Path, **options: Any) -> dict[str, Any]:
    """The `zero_optimization` section of a combination; small tiles, and nothing kept in memory that need not be."""
    zero: dict[str, Any] = {"sub_group_size": TILE, "stage3_max_reuse_distance": 300}
    nvme = {"nvme_path": str(path)}
    if optimizer != "none":
        zero["offload_optimizer"] = {"device": optimizer, **nvme, **options}
    if param != "none":
        zero["offload_param"] = {"device": param, **nvme, "max_in_cpu": 0}
    return zero


@functools.lru_cache(maxsize=None)
def in_memory(
    name: str, stage: int, world_size: int, clip: float, precision: str | None = None, make_kwargs: Any = None
) -> Any:
    """The run without offload that every tier must equal bit for bit."""
    return _run(name, stage, world_size, clip, precision, {"stage3_max_reuse_distance": 300}, make_kwargs)


def cpu_adam(model: Any) -> dict[str, Any]:
    """The optimizer that offload takes by itself, given by the user: so it runs without offload too."""
    return {"optimizer": DeepSpeedCPUAdam(model.parameters(), lr=LR, eps=EPS, weight_decay=0.01)}


def _run(
    name: str,
    stage: int,
    world_size: int,
    clip: float,
    precision: str | None,
    zero: dict[str, Any],
    make_kwargs: Any = None,
) -> Any:
    low = {precision: {"enabled": True, **({"loss_scale": 128} if precision == "fp16" else {})}} if precision else {}
    config = make_config(stage, micro=SAMPLES // world_size, accumulation=2, clip=clip, zero=zero, **low)
    config["optimizer"] = {"type": "AdamW", "params": {"lr": LR, "eps": EPS, "weight_decay": 0.01, "torch_adam": True}}
    return run_ranks(world_size, train, name, config, num_steps=5, make_kwargs=make_kwargs)[0]


def assert_same_bits(run: Any, expected: Any) -> None:
    assert run.losses == expected.losses
    assert run.grad_norms == expected.grad_norms
    assert run.weights.keys() == expected.weights.keys()
    assert [name for name in run.weights if not torch.equal(run.weights[name], expected.weights[name])] == []


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("stage", "optimizer", "param"), COMBINATIONS)
def test_every_tier_gives_the_bits_of_no_offload(
    stage: int, optimizer: str, param: str, world_size: int, tmp_path: Path
) -> None:
    run = _run("gpt_tied", stage, world_size, 0.5, None, offloaded(stage, optimizer, param, tmp_path))
    assert_same_bits(run, in_memory("gpt_tied", stage, world_size, 0.5))
    assert_equals(run, oracle("gpt_tied", 5, 2, 0.5))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(("stage", "optimizer", "param"), [c for c in COMBINATIONS if "none" not in c[1:2]])
def test_low_precision_gives_the_bits_of_no_offload(
    stage: int, optimizer: str, param: str, precision: str, tmp_path: Path
) -> None:
    run = _run("gpt_untied", stage, 2, 0.5, precision, offloaded(stage, optimizer, param, tmp_path))
    assert_same_bits(run, in_memory("gpt_untied", stage, 2, 0.5, precision))


@pytest.mark.parametrize("precision", [None, "bf16", "fp16"])
@pytest.mark.parametrize(("stage", "optimizer", "param"), [(2, "cpu", "none"), (3, "cpu", "cpu"), (3, "nvme", "nvme")])
def test_the_fused_cpu_step_gives_the_bits_of_the_same_optimizer_in_memory(
    stage: int, optimizer: str, param: str, precision: str | None, tmp_path: Path
) -> None:
    zero = offloaded(stage, optimizer, param, tmp_path)
    run = _run("gpt_tied", stage, 2, 0.5, precision, zero, cpu_adam)
    assert_same_bits(run, in_memory("gpt_tied", stage, 2, 0.5, precision, cpu_adam))


@pytest.mark.parametrize("ratio", [0.0, 0.4])
@pytest.mark.parametrize("device", ["cpu", "nvme"])
def test_a_step_shared_between_tier_and_device_gives_the_same_bits(device: str, ratio: float, tmp_path: Path) -> None:
    run = _run("gpt_tied", 3, 2, 0.5, None, offloaded(3, device, "none", tmp_path, ratio=ratio))
    assert_same_bits(run, in_memory("gpt_tied", 3, 2, 0.5))


@pytest.mark.parametrize("name", ["unused", "frozen", "experts", "branching"])
def test_parameters_without_gradients_keep_their_values_on_disk(name: str, tmp_path: Path) -> None:
    run = _run(name, 3, 2, 0.0, None, offloaded(3, "nvme", "nvme", tmp_path))
    assert_same_bits(run, in_memory(name, 3, 2, 0.0))
