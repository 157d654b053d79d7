"""Large tensors in main memory, in pages of 2 MiB where Linux gives them on request.

Asked for before a kernel writes a large result on CPUs: every first touch of a page of 4 KiB is a call into the operating system,
which on virtual machines takes longer than filling the page: 43 ms against 9 ms for 64 MiB (EPYC 7003, KVM, `enabled` = madvise).
And asked for weights that rest and are read for every token (`gather_in_large_pages`): where there is a table of pages beneath that
of the host, finding 4 KiB takes a core from a third of what it reads (attention over bf16, EPYC 9005, KVM: 23 to 36 GB/s).

Invariant: values, and what is allocated, are the same; where the request fails, nothing happens.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

MIN_NBYTES = 8 << 20
"""Below, there is little to gain."""

_ROW_NBYTES = 256
_LARGE = 2 << 20
_PIECE = 8 << 20  # bytes between looks at the clock
_PATIENCE_S = 0.1
_NBYTES_PER_S = 1e9
_MADV_COLLAPSE = 25  # since Linux 6.1; older ones refuse it


@functools.cache
def _madvise() -> Any:
    try:
        return ctypes.CDLL(None).madvise if hasattr(mmap, "MADV_HUGEPAGE") else None
    except (OSError, AttributeError):
        return None


def in_large_pages(tensor: Tensor) -> Tensor:
    """`tensor`, whose memory nobody has written yet."""
    nbytes = tensor.untyped_storage().nbytes()
    if nbytes < MIN_NBYTES or type(tensor) is not torch.Tensor or tensor.device.type != "cpu":
        return tensor
    ask = _madvise()
    if ask is not None:
        start, stop = _inside(tensor, mmap.PAGESIZE)
        ask(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_HUGEPAGE)
    return tensor


def empty_rows(shape: Sequence[int], like: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor after `like` that nobody has written yet; in main memory it begins at a multiple of 256 bytes.

    So do rows of that many bytes, a position of a cache in bf16, say. torch begins 64 bytes behind one: attention where 8 heads
    share a cache in bf16 then reads 17 GB/s where it reads 21 (EPYC 9005, of 44).
    """
    if type(like) is not torch.Tensor or like.device.type != "cpu":
        return like.new_empty(shape, dtype=dtype)
    numel = math.prod(shape)
    room = like.new_empty(numel + _ROW_NBYTES // dtype.itemsize, dtype=dtype)
    start = -room.data_ptr() % _ROW_NBYTES // dtype.itemsize
    return room[start : start + numel].view(shape)


def gather_in_large_pages(tensors: Iterable[Tensor]) -> int:
    """Have Linux (6.1 and newer) put the memory of tensors that were written into pages of 2 MiB; the bytes that it did so for.

    Each storage once; what lies on devices, in files, is shared with other processes or holds no such page stays. Takes no more
    of a processor than a second for a GB, and a tenth of one to begin with: where free memory is in too many pieces, the rest stays as it is.
    """
    ask = _madvise()
    large = (tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.layout is torch.strided)
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in large}
    began, asked, done = time.thread_time(), 0, 0
    for tensor in storages.values():
        if ask is None or tensor.is_shared():
            continue
        start, stop = _inside(tensor, _LARGE)
        for piece in range(start, stop, _PIECE):
            length = min(_PIECE, stop - piece)
            if time.thread_time() - began > _PATIENCE_S + asked / _NBYTES_PER_S:
                return done
            asked += length
            if ask(ctypes.c_void_p(piece), ctypes.c_size_t(length), _MADV_COLLAPSE) == 0:
                done += length
    return done


def _inside(tensor: Tensor, page: int) -> tuple[int, int]:
    """Where the whole pages of a storage begin and end."""
    first, nbytes = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
    return -(-first // page) * page, (first + nbytes) // page * page
