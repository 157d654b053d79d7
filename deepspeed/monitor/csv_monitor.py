"""Events as CSV: one file per quantity, `<output_path>/<job_name>/<name with / and space as _>.csv`, header `step,<last part>`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from deepspeed.config.monitors import CsvMonitorConfig
from deepspeed.monitor.backend import Event, FlushEvery, Monitor
from deepspeed.utils.logging import current_rank


class CsvBackend:
    """Appends to its files, which stay open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, TextIO] = {}
        self._flush = FlushEvery()

    def write(self, events: Sequence[Event]) -> None:
        """See Backend."""
        lines: dict[str, list[str]] = {}
        for name, value, step in events:
            lines.setdefault(name, []).append(f"{step},{value}\n")
        for name, of_name in lines.items():
            file = self._files.get(name) or self._open(name)
            file.write("".join(of_name))
        if self._flush.is_due():
            for file in self._files.values():
                file.flush()

    def _open(self, name: str) -> TextIO:
        path = self.folder / f"{re.sub('[/ ]', '_', name)}.csv"
        is_new = not path.exists() or path.stat().st_size == 0
        file = self._files[name] = path.open("a", encoding="utf-8")
        if is_new:
            file.write(f"step,{name.rpartition('/')[2]}\n")
        return file

    def close(self) -> None:
        """See Backend."""
        while self._files:
            self._files.popitem()[1].close()


class csvMonitor(Monitor):  # noqa: N801 - the contract's name
    """`csv_monitor`."""

    def __init__(self, csv_config: CsvMonitorConfig) -> None:
        enabled = csv_config.enabled and current_rank() == 0
        # Files are opened at the first event, and the script may have gone to another folder by then.
        folder = Path(csv_config.output_path, csv_config.job_name).absolute()
        super().__init__(lambda: CsvBackend(folder), enabled=enabled, name="csv_monitor")
