"""Page-aligned memory: what direct I/O moves without a copy.

Used by the store, the handle, checkpoints' staging, and buckets whose slices are read from a file.

Private and in huge pages, because a request of scattered pages costs the disk: on a virtual disk (virtio, Linux 6.18) reads,
writes and a stream of both run at 1.8, 2.5 and 2.2 GB/s with them, 1.6, 2.1 and 1.9 in small pages, and 1.2, 1.7 and 1.8 in shared
memory (`benchmarks/file_io.py --memory`).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap

import torch
from torch import Tensor

from deepspeed.tiers.pieces import PAGE

HUGE_PAGE = 2 << 20
"""Smaller buffers are not worth one."""

_MADV_HUGEPAGE = getattr(mmap, "MADV_HUGEPAGE", None)


def aligned_buffer(nbytes: int, *, is_locked: bool = False, is_huge: bool = True) -> Tensor:
    """`nbytes` zeros as uint8 at a page boundary; locked in memory if asked and allowed (RLIMIT_MEMLOCK).

    In small pages without `is_huge`: those are got sooner: a virtual machine whose host takes free huge pages back needed
    1.5 s for 1.2 GB of them, and 0.2 s for small ones.
    """
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if is_huge and nbytes >= HUGE_PAGE and _MADV_HUGEPAGE is not None:
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(_MADV_HUGEPAGE)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)[:nbytes]
    if is_locked and nbytes:
        lock(tensor)
    return tensor


def page_storage(nbytes: int) -> torch.UntypedStorage:
    """Memory for `at_page` to lay `nbytes` in, uninitialised; in huge pages where it is large. May be resized to nothing and back.

    torch's allocator does not align to pages, but places all large blocks alike: after resizing, a tensor is at a page
    boundary again. Where it is not, direct I/O copies.
    """
    storage = torch.UntypedStorage(nbytes + PAGE, device="cpu")
    if nbytes >= HUGE_PAGE:
        ask_for_huge_pages(at_page(storage, nbytes, torch.uint8))
    return storage


def at_page(storage: torch.UntypedStorage, numel: int, dtype: torch.dtype) -> Tensor:
    """[numel] in that storage, from its first page boundary on."""
    start = -storage.data_ptr() % PAGE // dtype.itemsize
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage, start, (numel,), (1,))


def ask_for_huge_pages(tensor: Tensor) -> None:
    """Have new memory of a tensor on the CPU come in huge pages; of one of HUGE_PAGE bytes or more."""
    if _MADV_HUGEPAGE is not None:
        begin, end = -(-tensor.data_ptr() // PAGE) * PAGE, (tensor.data_ptr() + tensor.nbytes) // PAGE * PAGE
        _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_HUGEPAGE)


def give_memory_back() -> None:
    """Have the allocator return what is free to the system, where it can: glibc before 2.39 seldom uses an aligned block again that
    was freed between others, so that many buckets of a few MB, made and dropped one by one, would pile up."""
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def lock(tensor: Tensor) -> bool:
    """Keep the tensor's pages in memory; False where the limit forbids it."""
    return bool(_libc.mlock(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes)) == 0)


_libc = ctypes.CDLL(None, use_errno=True)
