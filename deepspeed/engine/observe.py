"""The observers that a configuration asks for, the run directory, and the line at the start.

Called by the engine as it is built. Without anything to watch there are no observers, and a phase is one span.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deepspeed.accelerator import get_accelerator
from deepspeed.config import Config
from deepspeed.engine.observer import Observer, computing_dtype
from deepspeed.engine.step_profiler import StepProfiler
from deepspeed.engine.step_report import StepReport
from deepspeed.engine.step_trace import StepTrace
from deepspeed.mesh import Mesh
from deepspeed.monitor.line import short
from deepspeed.monitor.master import SECTIONS, MonitorMaster
from deepspeed.monitor.run_record import default_folder
from deepspeed.utils.dtypes import dtype_name
from deepspeed.utils.logging import current_rank
from deepspeed.zero.hooks import BackwardWatch

if TYPE_CHECKING:
    from deepspeed.engine.engine import DeepSpeedEngine


def run_directory(config: Config, mesh: Mesh) -> Path | None:
    """Where this run keeps its record; None for nowhere. The first rank decides. Collective."""
    monitor = config.monitor
    named = monitor.named_dir()
    is_watched = bool(named or config.steps_per_print or monitor.trace_step) or any(
        getattr(config, section).enabled for section in SECTIONS
    )
    keeps = is_watched if monitor.enabled is None else monitor.enabled
    mine = (named or str(default_folder())) if keeps else None
    chosen = mesh.gather_objects("job", mine)[0]
    return Path(chosen) if chosen else None


def make_observers(
    config: Config, monitor: MonitorMaster, model: torch.nn.Module, watch: BackwardWatch
) -> list[Observer]:
    """The observers that the configuration asks for."""
    made: list[Observer] = []
    if config.steps_per_print or monitor.enabled or config.comms_logger.enabled:
        made.append(StepReport(config, monitor, watch))
    if config.flops_profiler.enabled:
        made.append(StepProfiler(config.flops_profiler, model))
    if config.monitor.trace_step is not None:
        folder = monitor.run_dir or Path()
        made.append(StepTrace(folder, config.monitor.trace_step, config.monitor.trace_num_steps))
    return made


def start_summary(engine: DeepSpeedEngine) -> dict[str, Any]:
    """What the run is, for the record and the line at the start."""
    config = engine._config
    return {
        "time": time.time(),
        "model": type(engine.module).__name__,
        "params": engine.num_parameters(),
        "zero_stage": config.zero_optimization.stage,
        "ranks": engine.dp_world_size,
        "dtype": dtype_name(computing_dtype(config)),
        "optimizer": type(engine.basic_optimizer).__name__ if engine.basic_optimizer is not None else None,
        "train_batch_size": engine.train_batch_size(),
        "micro_batch_size": engine.train_micro_batch_size_per_gpu(),
        "accumulation": engine.gradient_accumulation_steps(),
        "device": get_accelerator().device_name(),
        "torch": torch.__version__,
    }


def announce(engine: DeepSpeedEngine) -> None:
    """Begin the record, and say in one line what is trained, where progress is wanted."""
    monitor: MonitorMaster = engine.monitor
    if current_rank() != 0 or not engine._observers:
        return
    said = start_summary(engine)
    monitor.write_line("start", said)
    if engine._config.steps_per_print:
        print(
            f"deepspeed: {said['model']} with {short(said['params'])} parameters, ZeRO-{said['zero_stage']} over "
            f"{said['ranks']} {'ranks' if said['ranks'] > 1 else 'rank'}, {said['dtype']}, {said['optimizer']}, "
            f"{said['train_batch_size']} samples per step ({said['micro_batch_size']} x {said['accumulation']} x "
            f"{said['ranks']})" + (f"; record in {monitor.run_dir}" if monitor.run_dir else ""),
            flush=True,
        )
