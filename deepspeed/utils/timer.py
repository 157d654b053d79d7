"""Timers: of named phases, and of throughput. They attach from outside the training step; off costs nothing.

Host time; where the device works asynchronously a timer waits for it at start and stop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch

from deepspeed.utils.logging import log_dist, logger

FORWARD_MICRO_TIMER, FORWARD_GLOBAL_TIMER = "fwd_microstep", "fwd"
BACKWARD_MICRO_TIMER, BACKWARD_GLOBAL_TIMER = "bwd_microstep", "bwd"
BACKWARD_INNER_MICRO_TIMER, BACKWARD_INNER_GLOBAL_TIMER = "bwd_inner_microstep", "bwd_inner"
BACKWARD_REDUCE_MICRO_TIMER, BACKWARD_REDUCE_GLOBAL_TIMER = "bwd_allreduce_microstep", "bwd_allreduce"
STEP_MICRO_TIMER, STEP_GLOBAL_TIMER = "step_microstep", "step"
"""Names that the original gives its timers; scripts time with them. The engine here has forward, backward and step."""


class Timer:
    """One named phase. Times in milliseconds."""

    def __init__(self, name: str, wait: Callable[[], Any] | None = None) -> None:
        self.name_ = name
        self._wait = wait or (lambda: None)
        self._started_s: float | None = None
        self._total_ms = 0.0
        self._records: list[float] = []

    def start(self) -> None:
        """Begin; a second start without stop is an error."""
        assert self._started_s is None, f"timer {self.name_} is already running"
        self._wait()
        self._started_s = time.perf_counter()

    def stop(self, reset: bool = False, record: bool = False) -> None:
        """End; adds to the total, or replaces it if `reset`; `record` keeps it for `mean`."""
        assert self._started_s is not None, f"timer {self.name_} is not running"
        self._wait()
        passed_ms = (time.perf_counter() - self._started_s) * 1e3
        self._total_ms = passed_ms if reset else self._total_ms + passed_ms
        self._started_s = None
        if record:
            self._records.append(passed_ms)

    def add(self, passed_ms: float) -> None:
        """Count what another clock measured."""
        self._total_ms += passed_ms
        self._records.append(passed_ms)

    def elapsed(self, reset: bool = True) -> float:
        """Total so far in ms, also of a pass that is running."""
        if self._started_s is not None:
            self.stop()
            self.start()
        total = self._total_ms
        if reset:
            self._total_ms = 0.0
        return total

    def mean(self) -> float:
        """Mean of the recorded passes in ms, 0 without any."""
        return sum(self._records) / len(self._records) if self._records else 0.0

    def reset(self) -> None:
        """Forget everything."""
        self._started_s, self._total_ms, self._records = None, 0.0, []


class SynchronizedWallClockTimer:
    """Timers by name: `timers("forward").start()`."""

    def __init__(self, wait: Callable[[], Any] | None = None) -> None:
        self.timers: dict[str, Timer] = {}
        self._wait = wait

    def __call__(self, name: str) -> Timer:
        return self.timers.setdefault(name, Timer(name, self._wait))

    def get_timers(self) -> dict[str, Timer]:
        """All timers by name."""
        return self.timers

    def get_mean(self, names: Sequence[str], normalizer: float = 1.0, reset: bool = True) -> dict[str, float]:
        """Mean milliseconds of the named timers that exist."""
        return {name: self.timers[name].mean() / normalizer for name in names if name in self.timers}

    def log(
        self,
        names: Sequence[str],
        normalizer: float = 1.0,
        reset: bool = True,
        memory_breakdown: bool = False,
        ranks: Sequence[int] | None = None,
    ) -> None:
        """Write the named timers' milliseconds in one line, on rank 0 unless `ranks` says else; with memory if asked."""
        parts = [f"{n}: {self.timers[n].elapsed(reset) / normalizer:.2f}" for n in names if n in self.timers]
        if memory_breakdown:
            parts.append(self.memory_usage())
        log_dist("time (ms) | " + " | ".join(parts), ranks or [0])

    @staticmethod
    def memory_usage() -> str:
        """The device's memory in use and its peak, as text; on machines without CUDA the process's."""
        if not torch.cuda.is_available():
            return f"host {psutil.Process().memory_info().rss / 2**30:.2f} GiB"
        now, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        return f"device {now / 2**30:.2f} GiB (peak {peak / 2**30:.2f} GiB)"


class NoopTimer:
    """Stands for timers that are off."""

    def __call__(self, name: str) -> NoopTimer:
        return self

    def start(self) -> None:
        """Nothing."""

    def stop(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def elapsed(self, *args: Any, **kwargs: Any) -> float:
        """Nothing was timed."""
        return 0.0

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def get_mean(self, names: Sequence[str], normalizer: float = 1.0, reset: bool = True) -> dict[str, float]:
        """Nothing was timed."""
        return {}


class ThroughputTimer:
    """Samples per second over steps, the first `start_step` left out. `batch_size` is the global batch of a step.

    Every `steps_per_output` steps `logging_fn` gets a line with it, with `monitor_memory` also the device's memory.
    """

    def __init__(
        self,
        config: Any = None,
        batch_size: int = 1,
        start_step: int = 2,
        steps_per_output: int | None = None,
        monitor_memory: bool = False,
        logging_fn: Callable[[str], None] | None = None,
    ) -> None:
        self.batch_size = max(1, batch_size)
        self.steps_per_output = steps_per_output
        self.monitor_memory = monitor_memory
        self.logging = logging_fn or logger.info
        self.start_step = start_step
        self.global_step_count = 0
        self.total_elapsed_time = 0.0
        self._started_s = 0.0
        self._num_timed = 0

    def start(self) -> None:
        """A step begins."""
        self._started_s = time.perf_counter()

    def stop(self, global_step: bool = False, report_speed: bool = True) -> None:
        """A micro-batch ended; with `global_step`, the step did."""
        if self._started_s and self.global_step_count >= self.start_step:
            self.total_elapsed_time += time.perf_counter() - self._started_s
            self._num_timed += int(global_step)
        self._started_s = 0.0
        self.global_step_count += int(global_step)
        is_due = global_step and self.steps_per_output and self.global_step_count % self.steps_per_output == 0
        if is_due and report_speed and self._num_timed:
            memory = f", {SynchronizedWallClockTimer.memory_usage()}" if self.monitor_memory else ""
            self.logging(f"step {self.global_step_count}: {self.avg_samples_per_sec():.4g} samples per second{memory}")

    def avg_samples_per_sec(self) -> float:
        """Global samples per second over the timed steps; -1 before the first."""
        if self._num_timed == 0:
            return -1.0
        return self._num_timed * self.batch_size / self.total_elapsed_time
