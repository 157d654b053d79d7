"""How long loading takes beside reading the same bytes, from memory (the page cache) and from the disk.

    python benchmarks/loading.py [--folder .] [--layers 6] [--width 2048] [--rounds 3]

Linear layers in one safetensors file; `init_inference` of the model on "meta", as it is and quantized, one thread for products. In
alternating rounds the same file is read from end to end into memory that was there before ("read"), and into new memory, as a model's
has to be ("new"): the system clears pages when they are first touched, which may take longer than a read from memory. The least counts.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import deepspeed
from deepspeed.tiers.buffers import aligned_buffer

RUNS_IN = {torch.float32: ("fp32", "bf16", "int8", "int4"), torch.bfloat16: ("bf16", "int8", "int4")}
"""By what is stored."""


def build(layers: int, width: int, device: str, dtype: torch.dtype) -> nn.Module:
    """The model."""
    with torch.device(device):
        return nn.Sequential(*(nn.Linear(width, width, bias=False, dtype=dtype) for _ in range(layers)))


def seconds(work: Callable[[], Any]) -> tuple[float, float]:
    """Of the clock and of this process, user and system; what is made is dropped afterwards."""
    start, cpu = time.perf_counter(), time.process_time()
    kept = work()
    found = time.perf_counter() - start, time.process_time() - cpu
    del kept
    return found


def read_into(path: Path, memory: torch.Tensor) -> None:
    """The whole file, in pieces of 8 MiB."""
    view: Any = memoryview(memory.numpy())  # type: ignore[arg-type]
    with path.open("rb", buffering=0) as file:
        at = 0
        while count := file.readinto(view[at : at + (8 << 20)]):
            at += count


def forget(path: Path) -> None:
    """Take a file out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(
    path: Path, make: Callable[[], nn.Module], dtype: str, rounds: int, is_cold: bool
) -> dict[str, list[float]]:
    """The least of both clocks for each way."""
    nbytes = path.stat().st_size
    there = torch.zeros(nbytes, dtype=torch.uint8)

    def read_new() -> torch.Tensor:
        memory = aligned_buffer(nbytes, is_huge=False)
        read_into(path, memory)
        return memory

    times: dict[str, list[tuple[float, float]]] = {"read": [], "new": [], "load": []}
    for _ in range(rounds + 1):
        load = partial(deepspeed.init_inference, make(), checkpoint=str(path), dtype=dtype)
        for name, work in (("read", partial(read_into, path, there)), ("new", read_new), ("load", load)):
            if is_cold:
                forget(path)
            times[name].append(seconds(work))
    return {name: [min(each[clock] for each in found[1:]) for clock in (0, 1)] for name, found in times.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default=".", help="on the disk that is measured")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, commit {commit.stdout.strip() or '?'}, "
        f"load {os.getloadavg()[0]:.1f}; ms by the clock, ratios by it and by the processor's time\n"
    )
    print(
        "| file | run in | from | MB | read | new | load | load / read | load / new | CPU: load / read | CPU: load / new |"
    )
    print("|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for stored, runs_in in RUNS_IN.items():
            make = partial(build, args.layers, args.width, "meta", stored)
            name = "fp32" if stored is torch.float32 else "bf16"
            path = Path(folder, f"{name}.safetensors")
            save_file({key: torch.randn(value.shape).to(stored) for key, value in make().state_dict().items()}, path)
            for dtype in runs_in:
                for is_cold in (False, True):
                    found = measure(path, make, dtype, args.rounds, is_cold)
                    clock, cpu = ({way: each[i] for way, each in found.items()} for i in (0, 1))
                    print(
                        f"| {name} | {dtype} | {'disk' if is_cold else 'memory'} | {path.stat().st_size / 1e6:.0f} | "
                        + " | ".join(f"{clock[way] * 1e3:.0f}" for way in clock)
                        + f" | {clock['load'] / clock['read']:.2f} | {clock['load'] / clock['new']:.2f}"
                        f" | {cpu['load'] / cpu['read']:.2f} | {cpu['load'] / cpu['new']:.2f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
