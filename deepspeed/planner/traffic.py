"""The bytes that a rank's ZeRO sends in one step of a data-parallel run, for who asks for them alone. Pure.

Invariant: those of `memory.messages`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from deepspeed.config import load_config
from deepspeed.memory.estimator import Estimator
from deepspeed.memory.messages import CountingReplay


def step_traffic(
    model: nn.Module, config: Any, batch: Any, *, world_size: int, device_type: str = "cpu"
) -> dict[str, int]:
    """Message bytes of one optimizer step by operation. Arguments as of `memory.estimate`."""
    made = Estimator(model, batch, device_type=device_type).engine(load_config(config), world_size=world_size)
    counting = CountingReplay(made.trace, made.plan, made.settings)
    counting.run()
    return {op: sent.nbytes for op, sent in counting.messages().items()}
