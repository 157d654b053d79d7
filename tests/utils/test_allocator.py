"""Freed blocks go back to the system once the allocator maps them on their own, unless the user has set the size."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from deepspeed.utils.allocator import is_set_by_user

SCRIPT = """
import ctypes
from deepspeed.utils.allocator import map_large_blocks

libc, mib = ctypes.CDLL(None), 1 << 20
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def block(size):
    at = libc.malloc(size * mib)
    ctypes.memset(at, 1, size * mib)
    return at

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / mib

told = map_large_blocks(mib)
libc.free(block(24))  # from which on glibc would map 24 MiB and more alone
below, above = block(16), block(16)
before = resident()
libc.free(below)
print(told, round(before - resident()))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc's allocator")
@pytest.mark.parametrize(("own", "found"), [({}, "True 16"), ({"MALLOC_MMAP_THRESHOLD_": "33554432"}, "False 0")])
def test_a_freed_block_between_others_is_returned_unless_the_user_has_set_the_size(
    own: dict[str, str], found: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**environment, **own}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == found.split()


def test_the_tunable_of_that_name_is_the_users_word_too() -> None:
    assert is_set_by_user({"GLIBC_TUNABLES": "glibc.malloc.tcache_count=1:glibc.malloc.mmap_threshold=65536"})
    assert not is_set_by_user({"GLIBC_TUNABLES": "glibc.malloc.tcache_count=1"})
