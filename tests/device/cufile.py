"""What stands for `torch.cuda.gds` on the simulated device: moves bytes at once, and knows nothing of streams, as cuFile."""

from __future__ import annotations

import contextlib
import os
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch


class GdsFile:
    """torch.cuda.gds.GdsFile, but for the handle that it registers."""

    num_bytes = 0
    """Moved by all files so far."""

    def __init__(self, filename: str, flags: int) -> None:
        self.fd = os.open(filename, flags)

    def __del__(self) -> None:
        os.close(self.fd)

    def load_storage(self, storage: torch.UntypedStorage, offset: int = 0) -> None:
        """Fill all of a storage from the file."""
        self._note(os.preadv(self.fd, [_bytes_of(storage)], offset), storage)

    def save_storage(self, storage: torch.UntypedStorage, offset: int = 0) -> None:
        """Write all of a storage to the file."""
        self._note(os.pwritev(self.fd, [_bytes_of(storage)], offset), storage)

    def _note(self, moved: int, storage: torch.UntypedStorage) -> None:
        if moved != storage.nbytes():
            raise RuntimeError("cuFileRead or cuFileWrite failed: short")
        GdsFile.num_bytes += moved


def _bytes_of(storage: torch.UntypedStorage) -> Any:
    assert storage.device.type == "sim", f"a storage on {storage.device}"
    whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return torch.ops.sim.as_cpu(whole).numpy()


@contextlib.contextmanager
def installed() -> Iterator[type[GdsFile]]:
    """In the block the simulated device has the library."""
    GdsFile.num_bytes = 0
    with mock.patch.object(torch.sim, "gds", types.SimpleNamespace(GdsFile=GdsFile), create=True):
        yield GdsFile
