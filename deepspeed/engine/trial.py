"""One run of the autotuner, seen from inside: its steps timed, its result written, and then its end.

An observer, made where the section `autotuning` names a `metric_path` (the autotuner writes it into a trial's configuration;
no script does). Steps `start_profile_step` to `end_profile_step` are timed by the wall clock, from the end of a step to the
end of the next, so that data loading and everything the script does count. When they are over, every rank has told its
times, the first rank has written the file, and all leave with exit code 0 after one step more.

    <metric_path>            the result, complete or not there
    <metric_path>.progress   {"step": n, "time": seconds since 1970}: how far the run is, so that a hung one is seen

Invariant: changes nothing that training computes. The collective is at a step that follows from the configuration.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from pathlib import Path
from typing import Any, final

from deepspeed.accelerator import get_accelerator
from deepspeed.config import Config
from deepspeed.engine.facts import StepFacts
from deepspeed.engine.observer import PHASES, Observer, PhaseClocks
from deepspeed.engine.step_work import StepWork, input_numels
from deepspeed.mesh import Mesh
from deepspeed.utils.errors import DeepSpeedError
from deepspeed.utils.logging import current_rank
from deepspeed.utils.waits import COMMUNICATION, OFFLOAD
from deepspeed.utils.whole_files import write_whole


@final
class Trial(Observer):
    """Times a few steps and ends the run."""

    def __init__(self, config: Config, clocks: PhaseClocks, mesh: Mesh, sizes: tuple[int, int]) -> None:
        """sizes: samples per rank and micro-batch, and micro-batches per step."""
        section = config.autotuning
        assert section.metric_path is not None, "made where a file is named"
        self._path = section.metric_path.absolute()
        self._first, self._last = section.start_profile_step, section.end_profile_step
        self._clocks, self._mesh, self._sizes = clocks, mesh, sizes
        self._work = StepWork()
        self._step = 0
        self._ends: list[float] = []
        self._flops: float | None = None
        self._input_numels: list[int] = []
        self._before = self._now()
        self._tell_progress()

    def _now(self) -> dict[str, float]:
        return self._clocks.seconds() | {"comm": COMMUNICATION.seconds, "offload": OFFLOAD.seconds}

    def begins(self, phase: str, value: Any) -> None:
        """See Observer."""
        self._work.begins(phase, value)
        if phase == "forward" and not self._input_numels:
            self._input_numels = input_numels(value)

    def ends(self, phase: str) -> None:
        """See Observer."""
        self._work.ends(phase)

    def step_ended(self, facts: StepFacts) -> None:
        """See Observer."""
        self._step = step = facts.progress.global_steps
        self._flops = self._work.flops() or self._flops
        self._work.end_step()
        if step in (self._first - 1, self._last) or self._first <= step < self._last:
            get_accelerator().synchronize()
            self._ends.append(time.perf_counter())
        if step == self._first - 1:
            self._before = self._now()
        if step == self._last:
            self._write()
        self._tell_progress()
        if step > self._last:
            raise SystemExit(0)

    def _write(self) -> None:
        """Collective: a step takes as long as its slowest rank does."""
        now = self._now()
        if len(self._ends) < 2:  # step 1 is measured, and nothing says when it began
            self._ends.insert(0, self._ends[0] - sum(now[p] - self._before[p] for p in PHASES))
        steps = [after - before for before, after in zip(self._ends[:-1], self._ends[1:], strict=True)]
        spent = {key: (now[key] - self._before[key]) / len(steps) for key in now}
        told = self._mesh.gather_objects("job", (steps, spent, get_accelerator().max_memory_allocated()))
        if current_rank() != 0:
            return
        slowest = [max(times) for times in zip(*(mine for mine, _, _ in told), strict=True)]
        micro, accumulation = self._sizes
        latency = statistics.median(slowest)  # a step that something else disturbed is not the configuration's
        batch = micro * accumulation * self._mesh.size("batch")
        result = {
            **{phase: max(mine[phase] for _, mine, _ in told) for phase in PHASES},
            "latency": latency,
            "throughput": batch / latency,
            "FLOPS_per_gpu": self._flops / latency if self._flops else None,
            "rank": 0,
            "step_s": slowest,
            "wait_comm_s": max(mine["comm"] for _, mine, _ in told),
            "wait_offload_s": max(mine["offload"] for _, mine, _ in told),
            "peak_nbytes": max(peak for _, _, peak in told),
            "train_batch_size": batch,
            "micro_batch": micro,
            "accumulation": accumulation,
            "input_numels": self._input_numels,
        }
        write_result(self._path, result)

    def _tell_progress(self) -> None:
        if current_rank() == 0:
            tell_progress(self._path, self._step)


def write_result(path: Path, values: dict[str, Any]) -> None:
    """Write what a run found, whole. Raises DeepSpeedError where that fails."""
    try:
        write_whole(path, json.dumps(values, indent=2))
    except OSError as error:
        raise DeepSpeedError(
            f"autotuning: the result of this run cannot be written: {path}: {error.strerror}.\n  Free some space there, or see that the folder can be written to."
        ) from None


def tell_progress(result: Path, step: int) -> None:
    """Say beside a result how far its run is. Where that fails nothing is said: the tuner looks at the disk itself."""
    with contextlib.suppress(OSError):
        write_whole(
            result.with_name(f"{result.name}.progress"), json.dumps({"step": step, "time": time.time()}, indent=2)
        )
