"""What an observer of the engine's steps is, and the clock they share.

Observers watch from outside. One is told when a phase (forward, backward, step) begins and ends, and when an optimizer
step is over, with the engine as an argument: it holds none, so that an engine that is dropped is freed.

Invariant: observers change nothing that training computes. What they do collectively, they do at steps that follow from
the configuration, which is the same on all ranks.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from deepspeed.accelerator import get_accelerator
from deepspeed.config import Config
from deepspeed.utils.waits import Waits

if TYPE_CHECKING:
    from deepspeed.engine.engine import DeepSpeedEngine


class Observer:
    """Base: watches nothing."""

    def begins(self, phase: str, value: Any) -> None:
        """A phase begins. `value`: forward's inputs, backward's loss, None."""

    def ends(self, phase: str) -> None:
        """It ends, also by an exception."""

    def step_ended(self, engine: DeepSpeedEngine) -> None:
        """An optimizer step is over, and counted."""

    def close(self) -> None:
        """The engine ends."""


class PhaseClock:
    """Time of one phase: the host's clock on a CPU, device events elsewhere, so that nothing has to wait."""

    def __init__(self) -> None:
        accelerator = get_accelerator()
        self._event = None if accelerator.device_name() == "cpu" else accelerator.Event
        self._passed = Waits()
        self._begun: Any = None
        self._last_s = 0.0

    def begin(self) -> None:
        """Start."""
        self._begun = self._now()

    def end(self) -> None:
        """Stop, if it was started."""
        begun, self._begun = self._begun, None
        if begun is None:
            return
        if self._event is None:
            self._passed.add(self._now() - begun)
        else:
            self._passed.add_events(begun, self._now())

    def take_s(self) -> float:
        """Seconds since the last call."""
        before, self._last_s = self._last_s, self._passed.seconds
        return self._last_s - before

    def _now(self) -> Any:
        if self._event is None:
            return time.perf_counter()
        event = self._event(enable_timing=True)
        event.record()
        return event


def computing_dtype(config: Config) -> torch.dtype:
    """The dtype that matrix products run in."""
    autocast = config.torch_autocast
    return (autocast.dtype or torch.bfloat16) if autocast.enabled else config.precision_dtype
