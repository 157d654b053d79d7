"""Configurations that the tests on the simulated device share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deepspeed
from tests.engine.runs import EPS, LR, make_config

TIERS = [
    (1, "cpu", "none"),
    (2, "cpu", "none"),
    (3, "cpu", "none"),
    (3, "none", "cpu"),
    (3, "cpu", "cpu"),
    (3, "none", "nvme"),
    (3, "nvme", "none"),
    (3, "nvme", "nvme"),
]
"""(stage, tier of masters and states, tier of parameters)."""


Found = tuple[list[float], dict[str, Tensor]]
"""Losses, and weights by name."""
STEPS = 3
"""Of runs of features."""
SGD = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}


def config_of(stage: int, *, accumulation: int = 2, clip: float = 0.0, **extra: Any) -> dict[str, Any]:
    """As `make_config`, with torch's AdamW: our own has another kernel on CPUs than on devices."""
    config = make_config(stage, micro=3, accumulation=accumulation, clip=clip, **extra)
    config["optimizer"] = {"type": "AdamW", "params": {"lr": LR, "eps": EPS, "weight_decay": 0.01, "torch_adam": True}}
    return config


def tier_section(optimizer: str, param: str, path: Path) -> dict[str, Any]:
    """The `zero_optimization` section that puts bytes there; small tiles, nothing kept in memory that need not be."""
    zero: dict[str, Any] = {"stage3_max_reuse_distance": 300}
    for kind, tier in (("offload_optimizer", optimizer), ("offload_param", param)):
        if tier != "none":
            zero[kind] = {"device": tier, "nvme_path": str(path), "pin_memory": True}
            zero["sub_group_size"] = 1 << 11
    if param != "none":
        zero["offload_param"]["max_in_cpu"] = 0
    return zero


def settings(stage: int, **more: Any) -> dict[str, Any]:
    """As `config_of`, with SGD and one micro-batch a step."""
    return config_of(stage, accumulation=1, **{"optimizer": SGD, **more}) | {"optimizer": more.get("optimizer", SGD)}


def masters(engine: Any) -> dict[str, Tensor]:
    """What this rank holds of each parameter's master."""
    full = deepspeed.utils.safe_get_full_fp32_param
    trained = [(name, param) for name, param in engine.module.named_parameters() if param.requires_grad]
    return {name: full(param).cpu().clone() for name, param in trained}


def moved(inputs: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The inputs, where the engine computes."""
    return {name: tensor.to(device) for name, tensor in inputs.items()}
