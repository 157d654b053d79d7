"""A trace of some steps for Chrome's about:tracing or ui.perfetto.dev, by torch.profiler.

Spans carry the names of the code: engine.forward, engine.backward, engine.step, zero.unshard, zero.reduce; below them
torch's operators and, on an accelerator, the kernels. By the configuration (`monitor.trace_step`) or around any code with
`engine.trace(path)`. One file per rank.

Invariant: a trace that cannot be started or written is told, and training goes on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from deepspeed.accelerator import get_accelerator
from deepspeed.utils.logging import logger


def start_trace() -> torch.profiler.profile | None:
    """A profiler that records from now on; None where it cannot, for example beside another one."""
    if torch.autograd._profiler_enabled():
        logger.warning("no trace is taken: another profiler is running, and torch has room for one.")
        return None
    kinds = [torch.profiler.ProfilerActivity.CPU]
    name = get_accelerator().device_name().upper()
    if name != "CPU" and name in torch.profiler.ProfilerActivity.__members__:
        kinds.append(torch.profiler.ProfilerActivity[name])
    profiler = torch.profiler.profile(activities=kinds)
    profiler.start()
    return profiler


def stop_trace(profiler: torch.profiler.profile | None, path: Path) -> None:
    """End it and write its file."""
    if profiler is None:
        return
    try:
        profiler.stop()
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
    except Exception as error:  # training goes on without
        logger.warning("the trace %s could not be written: %s: %s", path, type(error).__name__, error)


@contextlib.contextmanager
def trace(path: str | Path) -> Iterator[None]:
    """Trace what runs inside into `path` (.json or .json.gz)."""
    path = Path(path).absolute()
    profiler = start_trace()
    try:
        yield
    finally:
        stop_trace(profiler, path)
