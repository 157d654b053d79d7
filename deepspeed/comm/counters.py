"""The compiled side of shared memory: counters that processes wait for, and copies beside them (`csrc/shared.cpp`).

Called by `comm.shared`, and by `comm.choose` to tell which ranks can share memory. Linux only.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

from deepspeed.kernels.native import library

NUM_WORDS = 3
"""How many numbers tell hosts apart."""


def host_words() -> tuple[int, ...] | None:
    """The same numbers on all processes that see each other's process numbers and memory; None: nothing of it here.

    Nodes that are namespaces of the network on one host count as hosts: who made them wants to see messages between them.
    """
    found = library()
    if found is None or not found.ds_shared_is_supported() or not hasattr(os, "memfd_create"):
        return None
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return int(boot.replace("-", "")[:15], 16), *(
            os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("pid", "net")
        )
    except OSError:
        return None


@functools.lru_cache(maxsize=1)
def words() -> ctypes.CDLL:
    """The compiled functions, with their types. Asked for where `host_words` gave some."""
    found = library()
    assert found is not None, "asked for before a board is made"
    found.ds_shared_put.argtypes = (
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
    )
    found.ds_shared_put.restype = None
    found.ds_shared_store.argtypes = (ctypes.c_void_p, ctypes.c_uint32)
    found.ds_shared_store.restype = None
    found.ds_shared_have_reached.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint32)
    found.ds_shared_wait.argtypes = (ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int64, ctypes.c_int64)
    return found
