"""The observers that a configuration asks for, the run directory, and the line at the start.

Called by the engine as it is built. Without anything to watch there are no observers, and a phase is one span.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deepspeed.accelerator import get_accelerator
from deepspeed.config import Config
from deepspeed.config.explain import show
from deepspeed.engine.at_rest import AtRest
from deepspeed.engine.expert_load import AuxiliaryLossWatch, ExpertLoads, trainable_gates
from deepspeed.engine.facts import RunFacts
from deepspeed.engine.observer import Observer, PhaseClocks
from deepspeed.engine.probe import Probe
from deepspeed.engine.step_profiler import StepProfiler
from deepspeed.engine.step_report import StepReport
from deepspeed.engine.step_trace import StepTrace
from deepspeed.engine.trial import Trial
from deepspeed.mesh import Mesh
from deepspeed.mesh.shape import Role
from deepspeed.monitor.line import short
from deepspeed.monitor.master import MonitorMaster
from deepspeed.utils.errors import DeepSpeedConfigError
from deepspeed.utils.logging import current_rank, warn_once
from deepspeed.utils.timer import NoopTimer, SynchronizedWallClockTimer
from deepspeed.zero.hooks import BackwardWatch


def run_directory(config: Config, mesh: Mesh) -> Path | None:
    """Where this run keeps its record; None for nowhere. The first rank decides. Collective.

    Raises DeepSpeedConfigError where a record or a trace is asked for and nothing names a directory.
    """
    monitor = config.monitor
    chosen: str = mesh.gather_objects("job", monitor.named_dir())[0]
    for key in ("enabled", "trace_step"):
        if getattr(monitor, key) and not chosen:
            raise DeepSpeedConfigError(
                f"monitor.{key} = {show(getattr(monitor, key))} needs a directory, and none is named.\n"
                "  Set monitor.run_dir, the environment variable DS_RUN_DIR, or the launcher's --run_dir."
            )
    return Path(chosen).absolute() if chosen and monitor.enabled is not False else None


@dataclass(frozen=True)
class Watched:
    """What observers are made over."""

    model: torch.nn.Module
    watch: BackwardWatch
    mesh: Mesh
    at_rest: AtRest
    timers: SynchronizedWallClockTimer | NoopTimer
    sizes: tuple[int, int]
    """Samples per rank and micro-batch, micro-batches per step."""
    user_config: dict[str, Any]
    make_engine: Callable[..., Any]
    """Another engine, of `model` and `config` by name."""


def make_observers(config: Config, monitor: MonitorMaster, watched: Watched) -> list[Observer]:
    """The observers that the configuration asks for; the clock first, whose times the others read."""
    reports = bool(config.steps_per_print or monitor.enabled or config.comms_logger.enabled)
    made: list[Observer] = []
    tuning = config.autotuning
    is_trial = tuning.enabled and tuning.metric_path is not None
    is_probe = tuning.enabled and tuning.model_info is not None and tuning.model_info.profile and tuning.model_info_path
    if tuning.enabled and not is_trial and not is_probe:
        warn_once(
            "autotuning.enabled = true has no effect in training: `deepspeed --autotuning tune SCRIPT ...` reads the section."
        )
    if is_probe:
        made.append(Probe(config, watched.user_config, watched.model, watched.mesh, watched.sizes, watched.make_engine))
    if reports or is_trial or config.flops_profiler.enabled or config.wall_clock_breakdown:
        clocks = PhaseClocks(watched.watch, watched.timers)
        made.append(clocks)
        if reports:
            loads = ExpertLoads(watched.model, watched.mesh)
            made.append(StepReport(config, monitor, clocks, watched.mesh, watched.at_rest, loads))
        if config.flops_profiler.enabled and config.flops_profiler.profile_step > 0:
            made.append(StepProfiler(config, watched.model, clocks))
        if is_trial:
            made.append(Trial(config, clocks, watched.mesh, watched.sizes))
    gates = trainable_gates(watched.model)
    if gates:
        made.append(AuxiliaryLossWatch(gates))
    if config.monitor.trace_step is not None:
        folder = monitor.run_dir or Path()
        made.append(StepTrace(folder, config.monitor.trace_step, config.monitor.trace_num_steps))
    return made


def _shown(path: Path) -> Path:
    """A path as short as it can be from here."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


SHARED: dict[Role, str] = {
    "tensor": "ranks share layers",
    "sequence": "ranks share a sequence",
    "experts": "ranks share experts",
    "pipeline": "stages",
}


def divided(mesh: Mesh) -> str:
    """How the ranks are divided beside data parallelism, for people."""
    return ", ".join(f"{mesh.size(role)} {what}" for role, what in SHARED.items() if mesh.size(role) > 1)


def announce(facts: RunFacts, monitor: MonitorMaster, says_line: bool) -> None:
    """Begin the record, and say in one line what is trained, where progress is wanted."""
    if current_rank() != 0:
        return
    monitor.write_line("start", _start_line(facts))
    if says_line:
        print(
            f"deepspeed: {facts.model} with {short(facts.num_parameters)} parameters, ZeRO-{facts.zero_stage} over "
            f"{facts.num_ranks} {'ranks' if facts.num_ranks > 1 else 'rank'}{f' ({facts.divided})' if facts.divided else ''}, {facts.dtype}, {facts.optimizer}, "
            f"{facts.train_batch_size} samples per step ({facts.micro_batch_size} x {facts.accumulation} x "
            f"{facts.num_ranks})" + (f"; record in {_shown(monitor.run_dir)}" if monitor.run_dir else ""),
            flush=True,
        )


def _start_line(facts: RunFacts) -> dict[str, Any]:
    """The record's first line."""
    said = asdict(facts)
    said["params"], said["ranks"] = said.pop("num_parameters"), said.pop("num_ranks")
    return {"time": time.time(), **said, "device": get_accelerator().device_name(), "torch": torch.__version__}
