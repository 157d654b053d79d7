"""All monitors that a configuration asks for, as one. Made by the engine, and by scripts that log values of their own."""

from __future__ import annotations

import atexit
import functools
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from deepspeed.config import CometConfig, CsvMonitorConfig, TensorBoardConfig, WandbConfig, load_config
from deepspeed.monitor.backend import Event, FlushEvery, Monitor, as_events
from deepspeed.monitor.comet import CometMonitor
from deepspeed.monitor.csv_monitor import csvMonitor
from deepspeed.monitor.run_record import RunWriter
from deepspeed.monitor.step import StepNumbers
from deepspeed.monitor.tensorboard import TensorBoardMonitor
from deepspeed.monitor.wandb import WandbMonitor
from deepspeed.utils.logging import current_rank

SECTIONS = ("tensorboard", "wandb", "csv_monitor", "comet")
WRITE_EVERY_S = 0.5
"""Steps that are shorter are written together. Written one by one between two steps of training, whose arithmetic has
emptied the caches, each takes five times as long (0.15 ms against 0.03 ms, Xeon, 2 cores)."""


class MonitorSections(Protocol):
    """What `MonitorMaster` reads of a configuration; the root has it."""

    @property
    def tensorboard(self) -> TensorBoardConfig:
        """`tensorboard`."""

    @property
    def wandb(self) -> WandbConfig:
        """`wandb`."""

    @property
    def csv_monitor(self) -> CsvMonitorConfig:
        """`csv_monitor`."""

    @property
    def comet(self) -> CometConfig:
        """`comet`."""


class MonitorMaster:
    """Passes events to every enabled monitor. Writes on rank 0 only, and never raises.

    `enabled` says whether the configuration asks for any, on every rank, so that callers may skip computing events.
    With a `run_dir` the run's record is kept there.
    """

    def __init__(self, monitor_config: MonitorSections, run_dir: Path | None = None) -> None:
        self.run_dir = run_dir
        self.tb_monitor = TensorBoardMonitor(monitor_config.tensorboard, str((run_dir or Path()) / "tensorboard"))
        self.wandb_monitor = WandbMonitor(monitor_config.wandb)
        self.csv_monitor = csvMonitor(monitor_config.csv_monitor)
        self.comet_monitor = CometMonitor(monitor_config.comet)
        keeps_record = run_dir is not None and current_rank() == 0
        self.record = Monitor(lambda: RunWriter(run_dir or Path()), enabled=keeps_record, name="the run's record")
        self.enabled = run_dir is not None or any(getattr(monitor_config, section).enabled for section in SECTIONS)
        self._steps: list[tuple[StepNumbers, Sequence[tuple[str, Any, int]]]] = []
        self._is_due = FlushEvery(WRITE_EVERY_S).is_due
        self._writes = any(monitor.enabled for monitor in (*self.monitors, self.record))
        # Called in the reverse order: before the libraries of the monitors made above end what they have open.
        self._at_exit = functools.partial(_close, weakref.ref(self))
        if self._writes:
            atexit.register(self._at_exit)

    @property
    def monitors(self) -> list[Monitor]:
        """Those that take events, enabled or not."""
        return [self.tb_monitor, self.wandb_monitor, self.csv_monitor, self.comet_monitor]

    def write_events(self, event_list: Sequence[tuple[str, Any, int]]) -> None:
        """Write (name, value, step) tuples everywhere."""
        if self._writes:
            self.flush()
            events = as_events(event_list)
            for monitor in (*self.monitors, self.record):
                monitor.write(events)

    def write_step(self, numbers: StepNumbers, more_events: Sequence[tuple[str, Any, int]] = ()) -> None:
        """Write a step: as events, and as one line of the record. It is there within WRITE_EVERY_S of training."""
        if self._writes:
            self._steps.append((numbers, more_events))
            if self._is_due():
                self.flush()

    def flush(self) -> None:
        """Write the steps that wait to be written."""
        steps, self._steps = self._steps, []
        if not steps:
            return
        if any(monitor.backend is not None for monitor in self.monitors):
            events = [Event._make(event) for numbers, more in steps for event in (*numbers.as_events(), *more)]
            for monitor in self.monitors:
                monitor.write(events)
        self._add_to_record("step", [numbers.as_record() for numbers, _ in steps])

    def write_line(self, kind: str, values: dict[str, Any]) -> None:
        """Write a line of the record."""
        self.flush()
        self._add_to_record(kind, [values])

    def _add_to_record(self, kind: str, lines: list[dict[str, Any]]) -> None:
        writer = self.record.backend
        if isinstance(writer, RunWriter):
            self.record.attempt("could not write", lambda: writer.add_all(kind, lines))

    def close(self) -> None:
        """Write what waits, and end every monitor."""
        atexit.unregister(self._at_exit)
        self.flush()
        for monitor in (*self.monitors, self.record):
            monitor.close()


def _close(reference: weakref.ref[MonitorMaster]) -> None:
    master = reference()
    if master is not None:
        master.close()


def get_monitor_config(param_dict: dict[str, Any]) -> MonitorSections:
    """The monitor sections of a configuration given as a dict, for `MonitorMaster`."""
    return load_config({section: param_dict[section] for section in SECTIONS if section in param_dict})
