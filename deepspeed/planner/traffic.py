"""What a rank sends in one step, exactly, for who asks for it alone. Pure.

Invariant: those of `memory.messages`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from deepspeed.config import load_config
from deepspeed.memory.estimator import Estimator
from deepspeed.memory.messages import CountingReplay, Messages


def step_messages(
    model: nn.Module, config: Any, batch: Any, *, world_size: int, device_type: str = "cpu"
) -> dict[str, Messages]:
    """Messages of one optimizer step by operation, ZeRO's and those of layers that ranks share. Arguments as of `memory.estimate`."""
    made = Estimator(model, batch, device_type=device_type).engine(load_config(config), world_size=world_size)
    counting = CountingReplay(made.trace, made.plan, made.settings)
    counting.run()
    return counting.messages()


def step_traffic(
    model: nn.Module, config: Any, batch: Any, *, world_size: int, device_type: str = "cpu"
) -> dict[str, int]:
    """The same, bytes alone."""
    sent = step_messages(model, config, batch, world_size=world_size, device_type=device_type)
    return {op: each.nbytes for op, each in sent.items()}
