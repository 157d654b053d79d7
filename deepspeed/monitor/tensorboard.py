"""Events for TensorBoard, as scalars in an event file below `<output_path>/<job_name>`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepspeed.config.monitors import TensorBoardConfig
from deepspeed.monitor.backend import Event, FlushEvery, Monitor
from deepspeed.utils.logging import current_rank


class TensorBoardBackend:
    """Torch's own writer, which buffers for two minutes; flushed here every second, so that the page is live.

    Events of one step go as one record: a record each would wake the writer's thread a dozen times per step.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboard.compat.proto.summary_pb2 import Summary
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("the package tensorboard is missing. pip install tensorboard") from error
        self._summary = Summary
        self.summary_writer = SummaryWriter(log_dir=str(folder))
        self._writer: Any = self.summary_writer.file_writer
        self._flush = FlushEvery()

    def write(self, events: Sequence[Event]) -> None:
        """See Backend."""
        for step, same_step in itertools.groupby(events, lambda event: event.step):
            values = [self._summary.Value(tag=event.name, simple_value=event.value) for event in same_step]
            self._writer.add_summary(self._summary(value=values), step)
        if self._flush.is_due():
            self.summary_writer.flush()

    def close(self) -> None:
        """See Backend."""
        self.summary_writer.close()


class TensorBoardMonitor(Monitor):
    """`tensorboard`. `default_folder` is where files go if the section names no `output_path`."""

    def __init__(self, tensorboard_config: TensorBoardConfig, default_folder: str = "tensorboard") -> None:
        folder = Path(tensorboard_config.output_path or default_folder, tensorboard_config.job_name).absolute()
        enabled = tensorboard_config.enabled and current_rank() == 0
        super().__init__(lambda: TensorBoardBackend(folder), enabled=enabled, name="tensorboard")
