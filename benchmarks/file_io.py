"""Reading and writing files around the page cache: this package's queue beside fio, and DeepSpeed's aio_handle, in one run.

    python benchmarks/file_io.py [--folder DIR] [--mb 256] [--draws 5] [--rounds 3] [--peer PYTHON-with-deepspeed-0.19.8]

A shared disk swings by a factor of two within seconds, so contestants alternate, in a new order each round, each a second or
less at a time, and what counts is the median of the ratios of neighbours. Where a file lies on the disk and a buffer in
memory matters by tens of percent, so all use one file (only the store has its own), and everything is made anew several
times. fio runs with --direct=1 and the same block size, queue depth and file size by each of its engines; the one with the
best median is the measure.

fio moves the file through depth x block bytes of memory (psync: one block), and less memory is faster: it stays in the caches.
`queue` does the same with this package's queue. The others move the whole file to or from memory as large as it: `handle`
is `aio_handle.sync_pread/pwrite`; `store` is the nvme tier, with its checksums.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import mmap
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from deepspeed.config.storage import AioConfig
from deepspeed.tiers.aio import aio_handle
from deepspeed.tiers.block_file import BlockFile
from deepspeed.tiers.buffers import aligned_buffer
from deepspeed.tiers.io_queue import open_queue
from deepspeed.tiers.nvme import NvmeStore
from deepspeed.tiers.request import Means, Request, Ticket
from deepspeed.tiers.swap_folder import SwapFolder

FIO_ENGINES = ("io_uring", "libaio", "psync")
Run = Callable[[bool], float]
"""One transfer of the whole file, True to write; seconds."""

PEER = """
import sys, time, torch
from deepspeed.ops.op_builder import AsyncIOBuilder
path, nbytes, block, depth = sys.argv[1], *map(int, sys.argv[2:])
handle = AsyncIOBuilder().load().aio_handle(block, depth, False, True, 1)
buffer = handle.new_cpu_locked_tensor(nbytes, torch.empty(0, dtype=torch.uint8)).random_()
print("ready", flush=True)
for line in sys.stdin:
    begun = time.perf_counter()
    (handle.sync_pwrite if line.strip() == "w" else handle.sync_pread)(buffer, path, 0)
    print(time.perf_counter() - begun, flush=True)
"""


def fio(engine: str, folder: Path, nbytes: int, block: int, depth: int) -> Run:
    """fio by one of its engines."""

    def run(is_write: bool) -> float:
        command = f"fio --name=x --filename={folder}/file --size={nbytes} --bs={block} --iodepth={depth} --direct=1"
        command += f" --ioengine={engine} --rw={'write' if is_write else 'read'} --overwrite=1 --output-format=json"
        done = subprocess.run(command.split(), capture_output=True, text=True, check=True)
        job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["write" if is_write else "read"]
        return float(nbytes / job["bw_bytes"])

    run(True)
    return run


def handle(folder: Path, nbytes: int, block: int, depth: int, means: Means, flags: int | None = None) -> Run:
    """aio_handle, with memory of its own, or of small pages mapped with these flags."""
    io = aio_handle(block, depth, False, True, 1, means=means)
    if flags is None:
        buffer = io.new_cpu_locked_tensor(nbytes, torch.empty(0, dtype=torch.uint8)).random_()
    else:
        memory = mmap.mmap(-1, nbytes, flags=flags | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        buffer = torch.frombuffer(memory, dtype=torch.uint8).random_()
    path = folder / "file"
    io.sync_pwrite(buffer, path)

    def run(is_write: bool) -> float:
        begun = time.perf_counter()
        (io.sync_pwrite if is_write else io.sync_pread)(buffer, path)
        return time.perf_counter() - begun

    return run


def queue(folder: Path, nbytes: int, block: int, depth: int, stack: contextlib.ExitStack) -> Run:
    """The queue below both, through as much memory as fio uses, twice half of it in turns: depth times block."""
    made = open_queue(AioConfig(block_size=block, queue_depth=depth))
    stack.callback(made.close)
    half = block * max(depth // 2, 1)
    buffer = aligned_buffer(2 * half).random_()
    file = stack.enter_context(BlockFile(folder / "file", os.O_RDWR | os.O_CREAT))

    def run(is_write: bool) -> float:
        begun = time.perf_counter()
        under_way: deque[Ticket] = deque()
        for i, at in enumerate(range(0, nbytes, half)):
            if len(under_way) == 2:
                finish(under_way.popleft())
            address, size = buffer.data_ptr() + i % 2 * half, min(half, nbytes - at)
            request = Request(files=(file,), offset=at, address=address, nbytes=size, is_write=is_write)
            under_way.append(made.start(request))
        for ticket in under_way:
            finish(ticket)
        return time.perf_counter() - begun

    def finish(ticket: Ticket) -> None:
        while not ticket.wait(1.0):
            pass
        assert ticket.failure is None, ticket.failure

    run(True)
    return run


def store(folder: Path, nbytes: int, block: int, depth: int, stack: contextlib.ExitStack) -> Run:
    """NvmeStore."""
    made = NvmeStore(SwapFolder(folder, 0), AioConfig(block_size=block, queue_depth=depth))
    stack.callback(made.close)
    buffer = made.buffer(nbytes).random_()
    made.start_put("x", buffer).wait()

    def run(is_write: bool) -> float:
        begun = time.perf_counter()
        (made.start_put if is_write else made.start_get)("x", buffer).wait()
        return time.perf_counter() - begun

    return run


def peer(python: str, folder: Path, nbytes: int, block: int, depth: int, stack: contextlib.ExitStack) -> Run:
    """aio_handle of the DeepSpeed in another environment, in a process that stays."""
    command = [python, "-c", PEER, f"{folder}/file", str(nbytes), str(block), str(depth)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    stack.enter_context(process)
    to_peer, answers = process.stdin, process.stdout
    assert to_peer is not None
    assert answers is not None
    stack.callback(to_peer.close)
    while "ready" not in answers.readline():
        assert process.poll() is None, "the peer ended"

    def run(is_write: bool) -> float:
        print("w" if is_write else "r", file=to_peer, flush=True)
        return next(float(line) for line in answers if line[:1].isdecimal())  # its log goes there, too

    run(True)
    return run


@contextlib.contextmanager
def contestants(args: argparse.Namespace, block: int, depth: int) -> Iterator[dict[str, Run]]:
    """By name, ready to run."""
    nbytes = args.mb << 20
    with tempfile.TemporaryDirectory(dir=args.folder) as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        runs = {f"fio {engine}": fio(engine, folder, nbytes, block, depth) for engine in FIO_ENGINES}
        runs["queue"] = queue(folder, nbytes, block, depth, stack)
        runs["handle"] = handle(folder, nbytes, block, depth, Means.AUTO)
        runs["store"] = store(folder, nbytes, block, depth, stack)
        if args.memory:
            runs["small pages"] = handle(folder, nbytes, block, depth, Means.AUTO, mmap.MAP_PRIVATE)
            runs["shared"] = handle(folder, nbytes, block, depth, Means.AUTO, mmap.MAP_SHARED)
        for means in args.means:
            runs[means.lower()] = handle(folder, nbytes, block, depth, Means[means.upper()])
        if args.peer:
            runs["deepspeed"] = peer(args.peer, folder, nbytes, block, depth, stack)
        yield runs


def main() -> None:
    """Measure and print a table per block size and queue depth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--mb", type=int, default=256, help="file size")
    parser.add_argument("--draws", type=int, default=5, help="times that files and buffers are made anew")
    parser.add_argument("--rounds", type=int, default=3, help="turns per draw")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 4, 8], help="MiB")
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--means", nargs="*", default=[], help="also: io_uring libaio threads python")
    parser.add_argument("--memory", action="store_true", help="also: the handle in small pages, and in shared memory")
    parser.add_argument("--peer", help="a Python that has DeepSpeed 0.19.8 with async_io built")
    args = parser.parse_args()
    print(
        f"torch {torch.__version__}, Python {sys.version.split()[0]}, {os.cpu_count()} cores, {args.mb} MiB in {args.folder}"
    )
    for block in args.blocks:
        for depth in args.depths:
            seconds: dict[tuple[str, bool], list[float]] = {}
            for _ in range(args.draws):
                with contestants(args, block << 20, depth) as runs:
                    for _, is_write in itertools.product(range(args.rounds), (True, False)):
                        for name in random.sample([*runs], len(runs)):  # who goes first has it colder
                            seconds.setdefault((name, is_write), []).append(runs[name](is_write))
            for is_write in (True, False):
                print(f"{'write' if is_write else 'read'}, block {block} MiB, queue depth {depth}")
                best = min(
                    (f"fio {engine}" for engine in FIO_ENGINES), key=lambda n: statistics.median(seconds[n, is_write])
                )
                for name in runs:
                    own, measure = seconds[name, is_write], seconds[best, is_write]
                    ratios = [theirs / ours for ours, theirs in zip(own, measure, strict=True)]
                    speed = (args.mb << 20) / statistics.median(own) / 1e9
                    print(
                        f"  {name:12} {speed:5.2f} GB/s   of the best fio {statistics.median(ratios):.2f}"
                        f" ({min(ratios):.2f}-{max(ratios):.2f})",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
