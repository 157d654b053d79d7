"""Page-aligned memory: what direct I/O moves without a copy.

Used by the store and the handle. Large buffers ask for huge pages, because the kernel pins a buffer page by page for
every transfer.
"""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

from deepspeed.tiers.pieces import PAGE

HUGE_PAGE = 2 * 1024 * 1024


def aligned_buffer(nbytes: int, *, is_locked: bool = False) -> Tensor:
    """`nbytes` zeros as uint8 at a page boundary; locked in memory if asked and allowed (RLIMIT_MEMLOCK)."""
    if nbytes < HUGE_PAGE:
        memory = mmap.mmap(-1, max(PAGE, -(-nbytes // PAGE) * PAGE))
        start = 0
    else:
        memory = mmap.mmap(-1, (-(-nbytes // HUGE_PAGE) + 1) * HUGE_PAGE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE_PAGE
    tensor = torch.frombuffer(memory, dtype=torch.uint8)[start : start + nbytes]
    if is_locked and nbytes:
        lock(tensor)
    return tensor


def lock(tensor: Tensor) -> bool:
    """Keep the tensor's pages in memory; False where the limit forbids it."""
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.mlock(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes)) == 0)
