"""The section `flops_profiler`: an observer that drives a `FlopsProfiler` through two steps and prints what it found.

Counting slows a micro-batch down, and a first step allocates, so the step that is timed comes after the step that is
counted, and is at least the second:

    profile_step N > 1   count in step N - 1, time step N, report
    profile_step 1       count in step 1, time step 2, report

Counted is the first micro-batch and the update; times are means over the micro-batches of their step. Where the script
calls `loss.backward()` itself, backward is neither counted nor timed, but estimated.
"""

from __future__ import annotations

import contextlib
import enum
from typing import Any, final

import torch

from deepspeed.accelerator.peak import measured_peak
from deepspeed.config import Config
from deepspeed.engine.facts import StepFacts
from deepspeed.engine.observer import Observer, PhaseClocks, computing_dtype
from deepspeed.profiling.profiler import FlopsProfiler
from deepspeed.utils.logging import current_rank, logger


class State(enum.Enum):
    """Where a profile is."""

    WAITING = "waiting"
    """Nothing is attached."""
    COUNTING = "counting"
    """Hooks are on the model; operations are counted."""
    TIMING = "timing"
    """Hooks are on the model; modules are timed."""
    DONE = "done"
    """Nothing is attached."""


@final
class StepProfiler(Observer):
    """One profile per run."""

    def __init__(self, config: Config, model: torch.nn.Module, clocks: PhaseClocks) -> None:
        section = config.flops_profiler
        self.profiler = FlopsProfiler(model, recompute_fwd_factor=section.recompute_fwd_factor)
        self.state = State.WAITING
        self._config = section
        self._output_file = section.output_file.absolute() if section.output_file else None
        self._dtype = computing_dtype(config)
        self._count_step = max(1, section.profile_step - 1)
        self._running = contextlib.ExitStack()
        self._clocks = clocks
        self._saw_backward = False
        self._num_forwards = 0
        if self._count_step == 1:
            self._start()

    def _start(self) -> None:
        self.profiler.open()
        self.state = State.COUNTING

    def begins(self, phase: str, value: Any) -> None:
        """See Observer."""
        watch = self.profiler.watch
        if watch is None or (phase == "forward" and not torch.is_grad_enabled()):
            return
        self._num_forwards += phase == "forward"
        if self.state is State.COUNTING and (phase == "step" or self._num_forwards == 1):
            self._running.enter_context(watch.counting(is_updating=phase == "step"))
        elif self.state is State.TIMING:
            self._saw_backward |= phase == "backward"
            if phase != "step":
                self._running.enter_context(watch.timing())

    def ends(self, phase: str) -> None:
        """See Observer."""
        self._running.close()

    def step_ended(self, facts: StepFacts) -> None:
        """See Observer."""
        if self.state is State.WAITING and facts.progress.global_steps >= self._count_step - 1:
            self._start()
        elif self.state is State.COUNTING:
            self.state = State.TIMING
            self._before = self._clocks.seconds()
        elif self.state is State.TIMING:
            self._report(facts)
            self.close()
        self._num_forwards = 0

    def _report(self, facts: StepFacts) -> None:
        profile = self.profiler.profile
        num_micro_batches = max(1, self._num_forwards)
        for module in profile.root.walk():
            module.forward_s /= num_micro_batches
            module.backward_s /= num_micro_batches
        now = self._clocks.seconds()
        if self._saw_backward:  # one that the script begins itself is estimated, as its operations are
            profile.root.backward_s = (now["backward"] - self._before["backward"]) / num_micro_batches
        profile.update_s = now["step"] - self._before["step"]
        profile.peak_flops = measured_peak(self._dtype)
        profile.title = f"{profile.root.name}, step {facts.progress.global_steps}, rank {current_rank()}"
        if current_rank() == 0:
            try:
                self.profiler.print_model_profile(
                    module_depth=self._config.module_depth,
                    top_modules=self._config.top_modules,
                    detailed=self._config.detailed,
                    output_file=self._output_file,
                )
            except OSError as error:
                logger.warning("flops_profiler.output_file could not be written, training goes on: %s", error)

    def close(self) -> None:
        """See Observer."""
        self._running.close()
        self.profiler.end_profile()
        self.state = State.DONE
