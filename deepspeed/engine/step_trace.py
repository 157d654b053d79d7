"""The keys `monitor.trace_step` and `monitor.trace_num_steps`: an observer that traces some steps into the run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

import torch

from deepspeed.engine.facts import StepFacts
from deepspeed.engine.observer import Observer
from deepspeed.monitor.trace import start_trace, stop_trace
from deepspeed.utils.logging import current_rank


@final
class StepTrace(Observer):
    """Writes one file per rank. Starts with the first phase of its first step."""

    def __init__(self, folder: Path, first_step: int, num_steps: int) -> None:
        self._path = folder / f"trace-rank{current_rank()}.json"
        self._before, self._last = first_step - 1, first_step + num_steps - 1
        self._profiler: torch.profiler.profile | None = None
        self._is_started = False

    def begins(self, phase: str, value: Any) -> None:
        """See Observer."""
        if self._before == 0:
            self._start()

    def step_ended(self, facts: StepFacts) -> None:
        """See Observer."""
        if facts.progress.global_steps == self._before:
            self._start()
        elif facts.progress.global_steps >= self._last:
            self.close()

    def _start(self) -> None:
        if not self._is_started:
            self._is_started = True
            self._profiler = start_trace()

    def close(self) -> None:
        """See Observer."""
        profiler, self._profiler = self._profiler, None
        stop_trace(profiler, self._path)
