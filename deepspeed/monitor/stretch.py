"""The steps between two progress lines, added up as they end: however many they are, no step is kept but the last. Pure."""

from __future__ import annotations

from collections import Counter
from typing import final

from deepspeed.monitor.step import StepNumbers


@final
class Stretch:
    """Sums over the steps since the last line; times in seconds."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.last: StepNumbers | None = None
        self.wall_s = self.wait_comm_s = self.wait_offload_s = 0.0
        self.samples = 0
        self.tokens: int | None = None
        """None where no step's were known."""
        self.flops: float | None = 0.0
        """None where one step's were not known."""
        self.offload_nbytes: Counter[str] = Counter()
        self._offload_s: dict[str, float] = {}
        self._phase_s: dict[str, float] = {}
        self._num_known: Counter[str] = Counter()

    def add(self, step: StepNumbers) -> None:
        """One step more, which has just ended."""
        self.num_steps += 1
        self.last = step
        self.wall_s += step.step_s
        self.wait_comm_s += step.wait_comm_s
        self.wait_offload_s += step.wait_offload_s
        self.samples += step.step_samples
        if step.step_tokens is not None:
            self.tokens = (self.tokens or 0) + step.step_tokens
        self.flops = None if self.flops is None or step.flops is None else self.flops + step.flops
        self.offload_nbytes.update(step.offload_nbytes)
        for kind, seconds in step.offload_s.items():
            self._offload_s[kind] = self.offload_s(kind) + seconds
        for phase, known_s in (("forward", step.forward_s), ("backward", step.backward_s), ("step", step.update_s)):
            if known_s is not None:
                self._phase_s[phase] = self._phase_s.get(phase, 0.0) + known_s
                self._num_known[phase] += 1

    def offload_s(self, kind: str) -> float:
        """Seconds of the "disk" at work, or of "compute" in the step of offloaded shards."""
        return self._offload_s.get(kind, 0.0)

    def mean_ms(self, phase: str) -> float:
        """Of "forward", "backward" or "step", over the steps where it is known."""
        return 1e3 * self._phase_s[phase] / self._num_known[phase] if self._num_known[phase] else 0.0
