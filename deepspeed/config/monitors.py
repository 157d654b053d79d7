"""Sections that only watch: `monitor`, `tensorboard`, `wandb`, `csv_monitor`, `comet`, `flops_profiler`, `comms_logger`,
`timers`.

Read by `deepspeed.monitor`, `deepspeed.profiling`, `deepspeed.comm` and the engine's timers. None changes training.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge
from pydantic import Field

from deepspeed.config.base import Int, Names, NonNegativeFloat, PositiveFloat, PositiveInt, Section


class MonitorConfig(Section):
    """`monitor`: the run's own record, `run.jsonl` in the run directory, and what is computed for it. Not in the original."""

    enabled: bool | None = None
    """Keep the record. When not given: if `run_dir` or the environment variable DS_RUN_DIR names a directory."""
    run_dir: str = ""
    """The run directory; "" means $DS_RUN_DIR, which the launcher's --run_dir sets. Without either, nothing is written."""
    peak_tflops: PositiveFloat | None = None
    """What one rank's device can do, for the utilisation (MFU); measured with matrix products when not given."""
    trace_step: PositiveInt | None = None
    """Step from which on a trace for Chrome or Perfetto is written to the run directory, by every rank; none when not given."""
    trace_num_steps: PositiveInt = 1
    """Steps in the trace."""

    def named_dir(self) -> str:
        """The run directory that the configuration or the environment names; "" for none."""
        return self.run_dir or os.environ.get("DS_RUN_DIR", "")


class TensorBoardConfig(Section):
    """`tensorboard`: write events for TensorBoard."""

    enabled: bool = False
    """Write them, on rank 0."""
    output_path: str = ""
    """Folder; "" means `tensorboard` in the run directory."""
    job_name: str = "DeepSpeedJobName"
    """Folder below it, so that runs stay apart."""


class WandbConfig(Section):
    """`wandb`: send events to Weights & Biases."""

    enabled: bool = False
    """Send them, from rank 0."""
    group: str | None = None
    """Group of runs this run joins."""
    team: str | None = None
    """Team that owns the project."""
    project: str = "deepspeed"
    """Project."""


class CsvMonitorConfig(Section):
    """`csv_monitor`: write events as CSV files, one per quantity."""

    enabled: bool = False
    """Write them, on rank 0."""
    output_path: str = ""
    """Folder; "" means the current one."""
    job_name: str = "DeepSpeedJobName"
    """Folder below it, so that runs stay apart."""


class CometConfig(Section):
    """`comet`: send events to Comet. What is not given comes from Comet's own settings."""

    enabled: bool = False
    """Send them, from rank 0."""
    samples_log_interval: PositiveInt = 100
    """Samples between two events."""
    project: str | None = None
    """Project."""
    workspace: str | None = None
    """Workspace that owns the project."""
    api_key: Annotated[str | None, Field(repr=False)] = None
    """Key of the account; better left to the environment."""
    experiment_name: str | None = None
    """Name of a new experiment."""
    experiment_key: str | None = None
    """Key of the experiment to continue or create."""
    online: bool | None = None
    """True sends at once, false keeps an offline archive."""
    mode: Literal["get", "create", "get_or_create"] | None = None
    """Continue an experiment, create one, or whichever fits."""


class FlopsProfilerConfig(Section):
    """`flops_profiler`: one step's floating-point operations and time, module by module."""

    enabled: bool = False
    """Profile. Turns `wall_clock_breakdown` on."""
    recompute_fwd_factor: NonNegativeFloat = 0.0
    """Share of forward that backward repeats (1 with full activation checkpointing)."""
    profile_step: Annotated[Int, Ge(-1)] = 1
    """The step that is profiled; 0 or -1: none."""
    module_depth: Annotated[Int, Ge(-1)] = -1
    """Depth of modules in the summary; -1 is the deepest."""
    top_modules: PositiveInt = 1
    """Modules listed per depth."""
    detailed: bool = True
    """Print the module tree."""
    output_file: Path | None = None
    """File for the report; printed when not given."""


class CommsLoggerConfig(Section):
    """`comms_logger`: count and time collectives."""

    enabled: bool = False
    """Log."""
    verbose: bool = False
    """A line per collective."""
    prof_all: bool = True
    """Log all of them; false logs those in `prof_ops`."""
    prof_ops: Names = ()
    """Names of collectives, such as all_reduce."""
    debug: bool = False
    """Add the calling function to the names."""


class ThroughputTimerConfig(Section):
    """`timers.throughput`: samples per second in the progress line."""

    enabled: bool = True
    """Measure."""
    synchronized: bool = True
    """Wait for the device before reading the clock; exact, at the price of a stall."""


class TimersConfig(Section):
    """`timers`: the engine's timers."""

    throughput: ThroughputTimerConfig = Field(default_factory=ThroughputTimerConfig)
    """Samples per second."""
