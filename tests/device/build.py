"""The library of the simulated device, compiled from `csrc/` once per change and kept in a folder that git ignores.

Called by `sim.install`. Plain g++ against torch's headers: half a minute the first time, nothing after.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "csrc"
BUILD = Path(__file__).parents[2] / "build" / "device"
TIMEOUT_S = 300


def compiler() -> str | None:
    """The C++ compiler's path, CXX's or g++; None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def library() -> Path:
    """The path of the compiled library. Processes that ask at once wait for the one that compiles.

    Raises RuntimeError with the compiler's words where it fails.
    """
    digest = hashlib.sha256(torch.__version__.encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    path = BUILD / f"libsim-{digest.hexdigest()[:16]}.so"
    if path.exists():
        return path
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _compile(path)
    return path


def _compile(path: Path) -> None:
    home = Path(torch.__file__).parent
    unfinished = path.with_suffix(f".{os.getpid()}")
    command = [compiler() or "g++", "-std=c++20", "-O1", "-fPIC", "-shared", str(SOURCES / "device.cpp")]
    command += [f"-I{home / 'include'}", f"-L{home / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-o", str(unfinished)]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    if "struct C10_API DeviceAllocator" not in (home / "include/c10/core/CachingDeviceAllocator.h").read_text():
        command.append("-DSIM_WITHOUT_DEVICE_ALLOCATOR")
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        raise RuntimeError(f"the simulated device does not compile:\n{done.stderr}")
    unfinished.rename(path)
