"""Configurations that the tests on the simulated device share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
