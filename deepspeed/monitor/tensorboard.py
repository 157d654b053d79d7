"""Events for TensorBoard, as scalars in an event file below `<output_path>/<job_name>`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deepspeed.config.monitors import TensorBoardConfig
from deepspeed.monitor.backend import Event, FlushEvery, Monitor
from deepspeed.utils.logging import current_rank


class TensorBoardBackend:
    """Torch's own writer, which buffers for two minutes; flushed here every second, so that the page is live."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("the package tensorboard is missing. pip install tensorboard") from error
        self.summary_writer = SummaryWriter(log_dir=str(folder))
        self._flush = FlushEvery()

    def write(self, events: Sequence[Event]) -> None:
        """See Backend."""
        for name, value, step in events:
            self.summary_writer.add_scalar(name, value, step)
        if self._flush.is_due():
            self.summary_writer.flush()

    def close(self) -> None:
        """See Backend."""
        self.summary_writer.close()


class TensorBoardMonitor(Monitor):
    """`tensorboard`. `default_folder` is where files go if the section names no `output_path`."""

    def __init__(self, tensorboard_config: TensorBoardConfig, default_folder: str = "tensorboard") -> None:
        folder = Path(tensorboard_config.output_path or default_folder, tensorboard_config.job_name)
        enabled = tensorboard_config.enabled and current_rank() == 0
        super().__init__(lambda: TensorBoardBackend(folder), enabled=enabled, name="tensorboard")
