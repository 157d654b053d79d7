"""Measuring how fast folders are read and written: what the commands `ds_io` and `ds_nvme_tune` share.

The idea: every worker has a file and a buffer of its own, and moves the whole file once per loop. Workers of several folders,
or several of one, are processes; a loop begins for all at once and lasts as long as the slowest. Files are laid out before
anything is timed and removed at the end.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import secrets
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from deepspeed.accelerator import get_accelerator
from deepspeed.config.storage import AioConfig
from deepspeed.tiers.aio import aio_handle, aio_read, aio_write
from deepspeed.tiers.block_file import BlockFile
from deepspeed.tiers.direct import DirectPiece, try_direct
from deepspeed.tiers.pieces import PAGE
from deepspeed.utils.errors import DeepSpeedError, NotAvailableError, TierError

Engine = Literal["aio_handle", "aio_basic", "torch_io"]
_DIRECT_CURE = "Measure without it, with --gpu alone: tensors pass through the CPU."
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True, kw_only=True, slots=True)
class Workspace:
    """Where one worker works."""

    folder: Path
    device: str = "cpu"
    """Whose tensors are moved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One thing to measure."""

    workspaces: tuple[Workspace, ...]
    nbytes: int
    """Per worker."""
    is_read: bool
    aio: AioConfig
    engine: Engine = "aio_handle"
    num_loops: int = 3
    num_warmups: int = 1
    is_validated: bool = False
    pins_by_accelerator: bool = False
    saves_legacy: bool = False
    """torch_io in torch's older format."""
    new_files: bool = False
    """A file of its own for each loop."""

    def measure(self) -> list[float]:
        """Seconds of each loop, warm-ups first. Raises TierError where a folder cannot be used."""
        for workspace in self.workspaces:
            if not workspace.folder.is_dir():
                raise TierError(
                    f"{workspace.folder} is no folder.\n  Name folders that exist, on the disks to measure."
                )
        if len(self.workspaces) == 1:
            with _Worker(self, 0) as worker:
                return [worker.loop(i) for i in range(self.num_warmups + self.num_loops)]
        return _measure_in_processes(self)

    def gb_s(self, seconds: float) -> float:
        """All workers' bytes in that time, in GB (1e9) per second."""
        return self.nbytes * len(self.workspaces) / seconds / 1e9


def parse_nbytes(text: str) -> int:
    """ "400M" in bytes: K, M and G are powers of 1024. Raises ValueError."""
    match = re.fullmatch(r"(\d+)([KMG]?)B?", text.strip().upper())
    if not match or not int(match[1]):
        raise ValueError(f"{text!r} is no size; write bytes, or a number with K, M or G.")
    return int(match[1]) * _UNITS[match[2]]


def has_direct_io(folder: Path) -> bool:
    """Whether files there are read and written around the page cache."""
    path = folder / f"ds_io-{secrets.token_hex(4)}"
    try:
        with BlockFile(path, os.O_RDWR | os.O_CREAT) as file:
            return file.direct_fd >= 0
    finally:
        path.unlink(missing_ok=True)


def check_direct(flag: str, folder: Path) -> None:
    """Raise NotAvailableError, naming the flag, where the device's library cannot open files there (GPUDirect Storage)."""
    path = folder / f"ds_io-{secrets.token_hex(4)}"
    try:
        with BlockFile(path, os.O_RDWR | os.O_CREAT) as file:
            found = try_direct([file], PAGE, 1)
    finally:
        path.unlink(missing_ok=True)
    if isinstance(found, str):
        raise NotAvailableError(f"{flag}: GPUDirect Storage is not available: {found}.\n  {_DIRECT_CURE}")
    found.close()


class _Worker:
    """One file, one buffer, and the call that moves one to the other."""

    def __init__(self, trial: Trial, index: int) -> None:
        self._trial, self._workspace = trial, trial.workspaces[index]
        self._name = f"ds_io-{os.getpid()}-{index}-{secrets.token_hex(4)}"
        aio = trial.aio
        self._handle = aio_handle(
            aio.block_size, aio.queue_depth, aio.single_submit, aio.overlap_events, aio.intra_op_parallelism
        )
        self._buffer = self._make_buffer()
        self._data = self._buffer.random_(0, 256).clone() if trial.is_validated else None
        self._paths: list[Path] = []
        self._finalizer = weakref.finalize(self, _unlink, self._paths)
        num_files = trial.num_loops + trial.num_warmups if trial.new_files else 1
        self._paths += [self._workspace.folder / f"{self._name}-{i}" for i in range(num_files)]
        if trial.is_read:
            for path in self._paths:
                self._write(path)

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._finalizer()

    def loop(self, index: int) -> float:
        """Move the file once; seconds."""
        path = self._paths[index % len(self._paths)]
        if self._data is not None and self._trial.is_read:
            self._buffer.zero_()
        begun = time.perf_counter()
        (self._read if self._trial.is_read else self._write)(path)
        get_accelerator().synchronize()
        seconds = time.perf_counter() - begun
        if self._data is not None:
            if not self._trial.is_read:
                self._buffer.zero_()
                self._read(path)
            if not torch.equal(self._buffer, self._data):
                raise TierError(f"{path}: what is read is not what was written.\n  Do not trust this disk.")
        return seconds

    def _make_buffer(self) -> Tensor:
        nbytes, device = self._trial.nbytes, self._workspace.device
        if device != "cpu":
            return torch.empty(nbytes, dtype=torch.uint8, device=device)
        if self._trial.pins_by_accelerator:
            return get_accelerator().pin_memory(torch.empty(nbytes, dtype=torch.uint8))
        return self._handle.new_cpu_locked_tensor(nbytes, torch.empty(0, dtype=torch.uint8))

    def _write(self, path: Path) -> None:
        aio = self._trial.aio
        if aio.use_gds:
            self._move_direct(path, is_write=True)
        elif self._trial.engine == "torch_io":
            torch.save(self._buffer, path, _use_new_zipfile_serialization=not self._trial.saves_legacy)
        elif self._trial.engine == "aio_basic":
            options = (aio.block_size, aio.queue_depth, aio.single_submit, aio.overlap_events)
            aio_write(self._buffer, path, *options, False)
        else:
            self._handle.sync_pwrite(self._buffer, path)

    def _read(self, path: Path) -> None:
        aio = self._trial.aio
        if aio.use_gds:
            self._move_direct(path, is_write=False)
        elif self._trial.engine == "torch_io":
            self._buffer.copy_(torch.load(path, weights_only=True))
        elif self._trial.engine == "aio_basic":
            options = (aio.block_size, aio.queue_depth, aio.single_submit, aio.overlap_events)
            aio_read(self._buffer, path, *options, False)
        else:
            self._handle.sync_pread(self._buffer, path)

    def _move_direct(self, path: Path, *, is_write: bool) -> None:
        """The device's library moves the bytes, in as many parts at once as there are threads."""
        num_threads, nbytes = self._trial.aio.intra_op_parallelism, self._buffer.numel()
        part_nbytes = -(-nbytes // num_threads // PAGE) * PAGE
        with BlockFile(path, os.O_RDWR | os.O_CREAT) as file:
            files = try_direct([file], part_nbytes, num_threads)
            if isinstance(files, str):
                raise TierError(f"{path} cannot be opened for GPUDirect Storage: {files}.\n  {_DIRECT_CURE}")
            moved: list[tuple[int, DirectPiece]] = []
            try:
                for start in range(0, nbytes, part_nbytes):
                    part = self._buffer[start : start + part_nbytes]
                    moved += [(start + at, piece) for at, piece in files.start(start, part, is_write=is_write)]
            finally:
                files.close()
            for at, (ticket, memory) in moved:
                if ticket.failure is not None:
                    why = os.strerror(ticket.failure.errno)
                    raise TierError(f"{path}: GPUDirect Storage failed at byte {at}: {why}.\n  {_DIRECT_CURE}")
                if not is_write and memory.data_ptr() != self._buffer.data_ptr() + at:
                    self._buffer[at : at + memory.numel()].copy_(memory)


def _unlink(paths: list[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _measure_in_processes(trial: Trial) -> list[float]:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(len(trial.workspaces)), context.SimpleQueue()
    workers = [
        context.Process(target=_work, args=(trial, index, barrier, results), daemon=True)
        for index in range(len(trial.workspaces))
    ]
    for worker in workers:
        worker.start()
    found: list[list[float]] = []
    try:
        while len(found) < len(workers):
            if results.empty():
                if any(worker.exitcode for worker in workers):
                    raise TierError("a process of the measurement ended early.\n  See what it wrote above.")
                time.sleep(0.01)
                continue
            got = results.get()
            if isinstance(got, str):
                raise TierError(got)
            found.append(got)
    finally:
        for worker in workers:
            worker.join(5.0)
            worker.kill()
    return [max(times) for times in zip(*found, strict=True)]


def _work(trial: Trial, index: int, barrier: Any, results: Any) -> None:
    try:
        with _Worker(trial, index) as worker:
            times = []
            for i in range(trial.num_warmups + trial.num_loops):
                barrier.wait()
                times.append(worker.loop(i))
        results.put(times)
    except threading.BrokenBarrierError:
        pass  # another one says why
    except (DeepSpeedError, OSError) as error:
        barrier.abort()
        results.put(str(error))


@contextlib.contextmanager
def errors_as_exit(name: str) -> Iterator[None]:
    """For a command: what a user can mend is one message and exit status 1."""
    try:
        yield
    except DeepSpeedError as error:
        raise SystemExit(f"{name}: {error}") from error
