"""What an observer of the engine's steps is, and the clock they share.

Observers watch from outside. One is told when a phase (forward, backward, step) begins and ends, and when an optimizer
step is over, with the step's facts. It holds no engine, so that an engine that is dropped is freed.

Invariant: observers change nothing that training computes. What they do collectively, they do at steps that follow from
the configuration, which is the same on all ranks.
"""

from __future__ import annotations

import time
from typing import Any, final

import torch

from deepspeed.accelerator import get_accelerator
from deepspeed.config import Config
from deepspeed.engine.facts import StepFacts
from deepspeed.utils.timer import NoopTimer, SynchronizedWallClockTimer
from deepspeed.utils.waits import Waits
from deepspeed.zero.hooks import BackwardWatch

PHASES = ("forward", "backward", "step")


class Observer:
    """Base: watches nothing."""

    def begins(self, phase: str, value: Any) -> None:
        """A phase begins. `value`: forward's inputs, backward's loss, None."""

    def ends(self, phase: str) -> None:
        """It ends, also by an exception."""

    def step_ended(self, facts: StepFacts) -> None:
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

    @property
    def seconds(self) -> float:
        """All that passed so far; waits for the device to pass the events that are open."""
        return self._passed.seconds

    def _now(self) -> Any:
        if self._event is None:
            return time.perf_counter()
        event = self._event(enable_timing=True)
        event.record()
        return event


@final
class PhaseClocks(Observer):
    """The one clock of forward, backward and step; the other observers and `engine.timers` read it.

    Backward is seen by the watch, also where the script calls `loss.backward()` itself. Evaluation is not counted.
    """

    def __init__(self, watch: BackwardWatch, timers: SynchronizedWallClockTimer | NoopTimer) -> None:
        self._clocks = {phase: PhaseClock() for phase in PHASES}
        self._timers = timers
        self._told = self.seconds()
        watch.on_begin.append(self._clocks["backward"].begin)
        watch.on_end.append(self._clocks["backward"].end)

    def begins(self, phase: str, value: Any) -> None:
        """See Observer."""
        if phase == "step" or (phase == "forward" and torch.is_grad_enabled()):
            self._clocks[phase].begin()

    def ends(self, phase: str) -> None:
        """See Observer."""
        if phase != "backward":
            self._clocks[phase].end()

    def seconds(self) -> dict[str, float]:
        """By phase, since the run began."""
        return {phase: clock.seconds for phase, clock in self._clocks.items()}

    def step_ended(self, facts: StepFacts) -> None:
        """Give `engine.timers` what the step took."""
        if isinstance(self._timers, NoopTimer):
            return
        now = self.seconds()
        for phase in PHASES:
            self._timers(phase).add(1e3 * (now[phase] - self._told[phase]))
        self._told = now


def computing_dtype(config: Config) -> torch.dtype:
    """The dtype that matrix products run in."""
    autocast = config.torch_autocast
    return (autocast.dtype or torch.bfloat16) if autocast.enabled else config.precision_dtype
