"""What glibc's allocator does with memory that was freed: the one place where its settings are changed.

Called where memory should be what is held and no more: `tile_model` on a CPU, and models that rest on a disk (`inference/streamed.py`).

By itself glibc raises the size from which it maps blocks on their own, up to 32 MiB, as soon as one of them is freed; tensors below it then
lie between others in the heap, and what was freed among them stays with the process. A fixed size ends that, for the whole process
and for good.

Invariant: what the user said (MALLOC_MMAP_THRESHOLD_, or the tunable of that name) stays.
Source: mallopt(3), "Tunables" of the GNU C library's manual.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

_M_MMAP_THRESHOLD = -3


def map_large_blocks(nbytes: int = 256 << 10) -> bool:
    """Have the allocator map blocks of `nbytes` and larger on their own, and unmap them when they are freed.

    Returns whether it does: False where the C library has no such call, refuses, or the user has set the size.
    """
    mallopt = None if is_set_by_user(os.environ) else getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(ctypes.c_int(_M_MMAP_THRESHOLD), ctypes.c_int(nbytes)))


def is_set_by_user(environment: Mapping[str, str]) -> bool:
    """Whether the environment names the size from which blocks are mapped."""
    return "MALLOC_MMAP_THRESHOLD_" in environment or "glibc.malloc.mmap_threshold" in environment.get(
        "GLIBC_TUNABLES", ""
    )
