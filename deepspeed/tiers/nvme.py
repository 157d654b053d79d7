"""Provisional store."""

from __future__ import annotations

import ctypes
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspeed.utils.errors import DeepSpeedError


class TierError(DeepSpeedError):
    """Bytes could not be moved to or from a tier."""


class _Transfer:
    def __init__(self, store: NvmeStore, future: Future[None], tensor: Tensor) -> None:
        self.store, self.future, self.tensor = store, future, tensor

    @property
    def is_done(self) -> bool:
        return self.future.done()

    def wait(self) -> None:
        start = time.perf_counter()
        try:
            self.future.result()
        except OSError as error:
            raise TierError(str(error)) from error
        finally:
            self.store.seconds_waiting += time.perf_counter() - start


def _memory(tensor: Tensor) -> memoryview:
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


class NvmeStore:
    def __init__(self, folder: Path, aio: Any = None) -> None:
        self.folder = folder = folder / str(os.getpid())
        folder.mkdir(parents=True, exist_ok=True)
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="deepspeed-aio")
        self._files: dict[str, int] = {}
        self.bytes_read = self.bytes_written = 0
        self.seconds_waiting = 0.0

    def reserve(self, key: str, nbytes: int) -> None:
        fd = os.open(self.folder / key, os.O_RDWR | os.O_CREAT, 0o600)
        if nbytes:
            os.posix_fallocate(fd, 0, nbytes)
        self._files[key] = fd

    def start_put(self, key: str, tensor: Tensor, offset_bytes: int = 0) -> _Transfer:
        self.bytes_written += tensor.nbytes
        view = _memory(tensor)
        fd = self._files[key]

        def put() -> None:
            done = 0
            while done < view.nbytes:
                done += os.pwrite(fd, view[done:], offset_bytes + done)

        return _Transfer(self, self._pool.submit(put), tensor)

    def start_get(self, key: str, into: Tensor, offset_bytes: int = 0) -> _Transfer:
        self.bytes_read += into.nbytes
        view = _memory(into)
        fd = self._files[key]

        def get() -> None:
            done = 0
            while done < view.nbytes:
                n = os.preadv(fd, [view[done:]], offset_bytes + done)
                if not n:
                    raise OSError(f"short read in {key}")
                done += n

        return _Transfer(self, self._pool.submit(get), into)

    def remove(self, key: str) -> None:
        fd = self._files.pop(key, None)
        if fd is not None:
            os.close(fd)
            (self.folder / key).unlink(missing_ok=True)

    def buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def close(self) -> None:
        self._pool.shutdown()
        for key in list(self._files):
            self.remove(key)
