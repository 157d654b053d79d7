"""The step report: what each step took, to the monitors, the run's record and the progress line.

An observer, made where progress lines, monitors, a run directory or the log of collectives are asked for.
"""

from __future__ import annotations

import struct
import time
from typing import Any, final

import psutil
import torch
from torch import Tensor

from deepspeed.accelerator import get_accelerator
from deepspeed.accelerator.peak import measured_peak
from deepspeed.comm.observe import hidden_share, measure_alone
from deepspeed.comm.recorder import Current
from deepspeed.config import Config
from deepspeed.engine.at_rest import AtRest
from deepspeed.engine.expert_load import ExpertLoads, in_numbers
from deepspeed.engine.facts import StepFacts
from deepspeed.engine.observer import PHASES, Observer, PhaseClocks, computing_dtype
from deepspeed.engine.step_work import SinceLast, StepWork
from deepspeed.mesh import Mesh
from deepspeed.monitor.line import RankNumbers, progress_line
from deepspeed.monitor.master import MonitorMaster
from deepspeed.monitor.step import StepNumbers
from deepspeed.monitor.stretch import Stretch
from deepspeed.utils.logging import current_rank
from deepspeed.utils.waits import COMMUNICATION, OFFLOAD, RESTING

COMM_EVERY = 10
"""Steps between two logs of collectives in the record, where `steps_per_print` does not say."""
MEMORY_EVERY_S = 0.5
"""Reading the process's memory takes the system a tenth of a millisecond; small models step that fast."""


@final
class StepReport(Observer):
    """Fills a `StepNumbers` per step, for the monitors, the record and the progress line."""

    def __init__(
        self,
        config: Config,
        monitor: MonitorMaster,
        clocks: PhaseClocks,
        mesh: Mesh,
        at_rest: AtRest,
        experts: ExpertLoads,
    ) -> None:
        self._config = config
        self._monitor = monitor
        self._every = config.steps_per_print
        self._clocks = clocks
        self._mesh = mesh
        self._at_rest = at_rest
        self._experts = experts
        self._tells_times = config.wall_clock_breakdown or config.flops_profiler.enabled
        self._since_line = Stretch()
        self._since_step = SinceLast()
        self._work = StepWork()
        self._losses: list[Tensor] = []
        self._peak: float | None = None
        self._memory: dict[str, int] = {}
        self._memory_read_s = 0.0
        self._sharing: tuple[int, int] | None = None
        """Ranks that see other samples; ranks that see other tokens."""
        COMMUNICATION.times_device = OFFLOAD.times_device = True

    def begins(self, phase: str, value: Any) -> None:
        """See Observer."""
        if phase == "forward" and not torch.is_grad_enabled():
            self._experts.pause()
            return  # evaluation is no training step
        if phase == "forward":
            self._since_step.begin()
        elif phase == "backward":
            self._losses.append(value)
        self._work.begins(phase, value)

    def ends(self, phase: str) -> None:
        """See Observer."""
        self._work.ends(phase)
        if phase == "forward":
            self._experts.resume()

    def step_ended(self, facts: StepFacts) -> None:
        """See Observer."""
        step = facts.progress.global_steps
        is_line = bool(self._every) and step % (self._every or 1) == 0
        if self._peak is None and self._work.has_counted:
            peak = self._config.monitor.peak_tflops
            self._peak = peak * 1e12 if peak else measured_peak(computing_dtype(self._config))
        numbers = self._numbers(facts, self._load_of_experts(step, is_line))
        times = _elapsed_events(numbers) if self._tells_times else {}
        self._monitor.write_step(numbers, [(name, value, numbers.samples) for name, value in times.items()])
        if self._every:
            self._since_line.add(numbers)
        if is_line:
            self._write_line()
        if self._config.comms_logger.enabled and step % (self._every or COMM_EVERY) == 0:
            self._write_comm(step)
        self._losses.clear()
        self._work.end_step()

    def _write_comm(self, step: int) -> None:
        recorder = Current.recorder
        if recorder is not None:
            number = step // (self._every or COMM_EVERY)
            if number & (number - 1) == 0:  # after a while there is nothing new; to ask costs a collective
                measure_alone(recorder)
            ops = recorder.summary(torch.distributed.get_world_size())
            hidden = hidden_share(recorder.flows.values())
            self._monitor.write_line("comm", {"step": step, "hidden": hidden, "ops": ops})

    def _load_of_experts(self, step: int, is_line: bool) -> dict[str, float] | None:
        """For monitors, the record and the line; None without experts, or where nobody reads it. Collective."""
        if not (self._experts.exist and (self._monitor.enabled or is_line)):
            return None
        loads = self._experts.take()
        if self._monitor.enabled and (is_line or step % (self._every or COMM_EVERY) == 0):
            layers = {name: load.counts for name, load in loads.items()}
            self._monitor.write_line("experts", {"step": step, "layers": layers})
        return in_numbers(loads)

    def _numbers(self, facts: StepFacts, experts: dict[str, float] | None) -> StepNumbers:
        now_s = time.perf_counter()
        if self._sharing is None:
            self._sharing = self._mesh.size("batch"), self._mesh.size("average")
        batch_ranks, token_ranks = self._sharing
        work = self._work
        return StepNumbers(
            step=facts.progress.global_steps,
            samples=facts.progress.global_samples,
            time=time.time(),
            loss=sum(loss.item() for loss in self._losses) / len(self._losses) if self._losses else None,
            lr=list(facts.lr),
            grad_norm=facts.grad_norm,
            loss_scale=facts.loss_scale,
            skipped=facts.progress.skipped_steps,
            step_samples=work.num_forwards * facts.micro_batch_size * batch_ranks,
            step_tokens=work.tokens * token_ranks if work.tokens is not None else None,
            flops=work.flops(),
            peak_flops=self._peak,
            memory=self._read_memory(now_s),
            experts=experts,
            **self._since_step.mark(now_s, self._clocks.seconds()),
        )

    def _read_memory(self, now_s: float) -> dict[str, int]:
        if now_s - self._memory_read_s < MEMORY_EVERY_S:
            return self._memory
        self._memory_read_s = now_s
        accelerator = get_accelerator()
        self._memory = {"device": accelerator.memory_allocated(), "device_peak": accelerator.max_memory_allocated()}
        if accelerator.device_name() != "cpu":  # there the device's memory is the process's
            self._memory["cpu"] = psutil.Process().memory_info().rss
        self._memory.update(RESTING)
        return self._memory

    def _write_line(self) -> None:
        steps, self._since_line = self._since_line, Stretch()
        last = steps.last
        assert last is not None, "a step has just ended"
        mine = RankNumbers(
            loss=last.loss,
            wall_s=steps.wall_s,
            wait_comm_s=steps.wait_comm_s,
            device_nbytes=last.memory["device"],
            device_peak_nbytes=last.memory["device_peak"],
        )
        ranks = _of_all_ranks(self._mesh, mine)
        if current_rank() != 0:
            return
        self._monitor.flush()  # what the line tells is in the record
        times = {phase: steps.mean_ms(phase) for phase in PHASES} if self._tells_times else None
        by_kind = self._at_rest.by_kind() if self._config.memory_breakdown else {}
        print(progress_line(steps, ranks, times, by_kind), flush=True)


def _elapsed_events(numbers: StepNumbers) -> dict[str, float]:
    """The contract's times. What of backward is not waiting for other ranks is `backward_inner`."""
    backward_s = numbers.backward_s or 0.0
    times = {
        "forward": numbers.forward_s or 0.0,
        "backward": backward_s,
        "backward_inner": max(0.0, backward_s - numbers.wait_comm_s),
        "backward_allreduce": numbers.wait_comm_s,
        "step": numbers.update_s or 0.0,
    }
    return {f"Train/Samples/elapsed_time_ms_{name}": 1e3 * value for name, value in times.items()}


def _of_all_ranks(mesh: Mesh, mine: RankNumbers) -> list[RankNumbers]:
    """Every data-parallel rank's numbers. Collective."""
    has_loss = mine.loss is not None
    values = (
        int(has_loss),
        _bits(mine.loss if mine.loss is not None else 0.0),
        _bits(mine.wall_s),
        _bits(mine.wait_comm_s),
        mine.device_nbytes,
        mine.device_peak_nbytes,
    )
    return [
        RankNumbers(
            loss=_float(loss) if has else None,
            wall_s=_float(wall),
            wait_comm_s=_float(wait),
            device_nbytes=device,
            device_peak_nbytes=peak,
        )
        for has, loss, wall, wait, device, peak in mesh.gather_ints("average", *values)
    ]


def _bits(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def _float(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])
