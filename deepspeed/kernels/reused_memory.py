"""Memory of large results on CPUs that is used again instead of going back to the system with every tensor.

Asked by `native_experts` for gradients of one layer's experts, which ZeRO has taken over before the next layer's are computed: the system
gives fresh pages in no less time than the gradients take to write (64 experts of 512 x 256: 60 ms of 160 where free memory is in
too many pieces for pages of 2 MiB; EPYC 9005, KVM). It is mapped apart from the allocator's.

Invariant: what a tensor is in is never given to another, a part of it included.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from deepspeed.kernels.pages import MIN_NBYTES

MAX_FREE_NBYTES = 256 << 20
"""Memory that is kept for the next who asks, at most."""


GRANULE = 2 << 20
"""Sizes are rounded up to it, so that what has a few rows more or less finds the same memory."""


class Reused:
    """Uninitialised tensors in memory that is used again, once no tensor is in it."""

    def __init__(self) -> None:
        self.buffers: list[mmap.mmap] = []
        self.probe = mmap.mmap(-1, mmap.PAGESIZE)
        self.lock = threading.Lock()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """[*shape], contiguous; small ones are the allocator's."""
        count = math.prod(shape)
        if count * dtype.itemsize < MIN_NBYTES:
            return torch.empty(*shape, dtype=dtype)
        nbytes = -(-count * dtype.itemsize // GRANULE) * GRANULE
        with self.lock:
            found = [buffer for buffer in self._free() if len(buffer) == nbytes][:1]
            if not found:
                found.append(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
                if hasattr(mmap, "MADV_HUGEPAGE"):
                    with contextlib.suppress(OSError):
                        found[0].madvise(mmap.MADV_HUGEPAGE)
                self.buffers.append(found[0])
            tensor = torch.frombuffer(found[0], dtype=dtype, count=count)
        self.trim()
        return tensor.view(*shape)

    def trim(self) -> None:
        """Give back what is free beyond what is kept, the oldest first."""
        with self.lock:
            free = self._free()
            excess = sum(map(len, free)) - MAX_FREE_NBYTES
            while free and excess > 0:
                excess -= len(free[0])
                self.buffers.remove(free.pop(0))

    def _free(self) -> list[mmap.mmap]:
        """Buffers that no tensor's storage refers to: as many references as to one that never was in a tensor."""
        owned = [self.probe, *self.buffers]
        counts = [sys.getrefcount(buffer) for buffer in owned]
        return [buffer for buffer, count in zip(owned[1:], counts[1:], strict=True) if count == counts[0]]


REUSED = Reused()
"""The process's."""
