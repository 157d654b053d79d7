"""The state of every random generator a training loop may draw from: Python, numpy, torch, the accelerator.

Captured by `save` on each rank and given back by `load` where the number of ranks is the same.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from deepspeed.accelerator import get_accelerator


def capture() -> dict[str, Any]:
    """The states now, as values that `values.encode` takes."""
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.random.get_rng_state(),
    }
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        states["accelerator"] = accelerator.get_rng_state()
    return states


def restore(states: dict[str, Any]) -> None:
    """Continue where `capture` was called."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.random.set_rng_state(states["torch"])
    accelerator = get_accelerator()
    if "accelerator" in states and accelerator.device_name() != "cpu":
        accelerator.set_rng_state(states["accelerator"])
