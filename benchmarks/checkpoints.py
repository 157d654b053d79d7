"""Saving and loading a 100M-parameter model on two ranks, beside what the disk can do, torch's DCP and the original.

    python benchmarks/checkpoints.py [--peer B/bin/python] [--folder DISK] [--rounds 3]
    python benchmarks/checkpoints.py --consolidate 2048x20

In every round all contestants take turns, since a shared disk's speed changes by the minute. The limit: both ranks write (read)
as many bytes each as its shard has, past the page cache in blocks of 4 MiB, then fsync. Durable: written and fsynced; for the original,
which does not fsync, its files are fsynced here. `--consolidate` makes a stage-3 bf16 checkpoint on one rank, then exports it to 16-bit
safetensors in a fresh process and reports its peak anonymous and total memory.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BLOCK = 4 << 20


def tree_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def sync_tree(folder: Path) -> None:
    """fsync everything below a folder."""
    for path in [folder, *folder.rglob("*")]:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def forget(folder: Path) -> None:
    """Drop a folder's files, which were fsynced, from the page cache."""
    for path in folder.rglob("*"):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def raw(path: Path, nbytes: int, is_write: bool) -> None:
    """Write or read a file in turn, past the page cache."""
    block = mmap.mmap(-1, BLOCK)
    block.write(os.urandom(1 << 16) * (BLOCK >> 16))
    fd = os.open(path, os.O_DIRECT | (os.O_CREAT | os.O_TRUNC | os.O_WRONLY if is_write else os.O_RDONLY), 0o600)
    for at in range(0, nbytes, BLOCK):
        if is_write:
            os.pwrite(fd, block, at)
        else:
            os.preadv(fd, [block], at)
    if is_write:
        os.fsync(fd)
    os.close(fd)


def engine_for(width: int, layers: int, stage: int, extra: dict[str, Any]) -> Any:
    """An engine in bf16 after one step, so that it has optimizer states."""
    import torch

    import deepspeed

    sys.path.insert(0, str(ROOT / "examples" / "gpt"))
    from model import Gpt, GptConfig

    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
        **extra,
    }
    model = Gpt(GptConfig(width=width, layers=layers, heads=width // 64, seq=8))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    tokens = torch.zeros(1, 8, dtype=torch.long, device=engine.device)
    engine.backward(engine(tokens, tokens))
    engine.step()
    return engine


class Clock:
    """Seconds by name, one per round; every rank counts its own."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}

    def measure(self, name: str, step: Callable[[], object], *, to_the_last: bool = True) -> None:
        """Time a step from when all ranks are here: until the last has done it, or this one."""
        import torch.distributed as dist

        dist.barrier()
        begun = time.perf_counter()
        step()
        if to_the_last:
            dist.barrier()
        self.add(name, time.perf_counter() - begun)

    def add(self, name: str, seconds: float) -> None:
        """Another round's."""
        self.times.setdefault(name, []).append(seconds)


def save_and_load(engine: Any, folder: Path, clock: Clock, rank: int, is_peer: bool) -> int:
    """One round of ours or of the original beside what the disk allows; the checkpoint's bytes."""
    import torch.distributed as dist

    ours = folder / "ours"
    clock.measure("save returns", lambda: engine.save_checkpoint(str(ours), tag="t"), to_the_last=False)
    if is_peer:
        clock.measure("fsync", lambda: sync_tree(ours) if rank == 0 else None)
    else:
        from deepspeed.checkpoint.files import finish_removals  # of the save that was replaced

        finish_removals()
        dist.barrier()
    nbytes = tree_bytes(ours)
    each = nbytes // 2 // BLOCK * BLOCK
    clock.measure("limit write", lambda: raw(folder / f"raw{rank}", each, True))
    clock.measure("limit read", lambda: raw(folder / f"raw{rank}", each, False))
    if not is_peer:
        forget(ours)
    clock.measure("load", lambda: engine.load_checkpoint(str(ours), tag="t"))
    return nbytes


def save_beside_training(engine: Any, ours: Path, clock: Clock) -> None:
    """One round of the asynchronous save: until it returns, and until it is durable."""
    engine._checkpoints.is_async = True
    clock.measure("async returns", lambda: engine.save_checkpoint(str(ours), tag="t"), to_the_last=False)
    engine.wait_for_checkpoint()
    clock.add("async durable", engine.wait_for_checkpoint().total_ms / 1e3)
    engine._checkpoints.is_async = False


def contest(folder: Path, rounds: int, is_peer: bool) -> None:
    """On every rank: the rounds; rank 0 prints medians and the median of ratios."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    rank, clock, nbytes = dist.get_rank(), Clock(), 0
    engine = engine_for(768, 14, 2, {})
    mesh = init_device_mesh("cpu", (2,))
    pieces = [torch.randn(1 << 22) for _ in range(36 if not is_peer else 0)]  # 100M elements x 3, in two shards
    state = {f"{i}": DTensor.from_local(piece, mesh, [Shard(0)]) for i, piece in enumerate(pieces)}
    for number in range(rounds + 1):  # the first one warms up
        nbytes = save_and_load(engine, folder, clock, rank, is_peer)
        if not is_peer:
            save_beside_training(engine, folder / "ours", clock)
            clock.measure("DCP save", lambda: dcp.save(state, checkpoint_id=folder / "dcp"))
            forget(folder / "dcp")
            clock.measure("DCP load", lambda: dcp.load(state, checkpoint_id=folder / "dcp"))
        if number == 0:
            clock.times.clear()
    if rank == 0:
        print("RESULT " + json.dumps({"mb": nbytes / 1e6, "times": clock.times}), flush=True)
    dist.barrier()
    os._exit(0)


def run_ranks(python: str, arguments: list[str], num_ranks: int) -> dict[str, Any]:
    """Start this file on ranks by hand; what rank 0 printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks)}
    env |= {"OMP_NUM_THREADS": "1", "LOCAL_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    env["DS_ACCELERATOR"] = "cpu"
    env["PYTHONPATH"] = str(ROOT) if python == sys.executable else ""
    env["PATH"] = f"{Path(python).parent}{os.pathsep}{env['PATH']}"
    ranks = [
        subprocess.Popen(
            [python, __file__, *arguments], cwd=tempfile.gettempdir(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(num_ranks)
    ]  # fmt: skip
    outputs = [""] * num_ranks

    def collect(i: int) -> None:
        outputs[i] = ranks[i].communicate()[0]

    threads = [threading.Thread(target=collect, args=(i,)) for i in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [line for line in outputs[0].splitlines() if line.startswith("RESULT ")]
    if not found:
        raise SystemExit("\n".join(outputs)[-4000:])
    return dict(json.loads(found[-1].removeprefix("RESULT ")))


def show(title: str, result: dict[str, Any]) -> None:
    """A table of medians with speed and share of the limit in the same rounds."""
    times, mb = result["times"], result["mb"]
    print(f"{title}: {mb:.0f} MB")
    for name, values in times.items():
        limit = times["limit read" if "load" in name or "read" in name else "limit write"]
        share = statistics.median(a / b for a, b in zip(limit, values, strict=True))
        print(f"  {name:14s} {1e3 * statistics.median(values):7.0f} ms ({1e3 * min(values):.0f}-{1e3 * max(values):.0f})"
              f"  {mb / 1e3 / statistics.median(values):5.2f} GB/s  {share:.2f} of the limit", flush=True)  # fmt: skip


def export(folder: Path) -> None:
    """In a fresh process: consolidate, with the peaks of anonymous and all resident memory."""
    from deepspeed.checkpoint.zero_to_fp32 import convert

    def status(key: str) -> float:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
        return int(line.split()[1]) / 1024

    anonymous, done = [status("RssAnon")], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            anonymous.append(status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun, base = time.perf_counter(), anonymous[0]
    import torch

    convert(folder / "ckpt", folder / "out", dtype=torch.bfloat16, safe_serialization=True)
    seconds = time.perf_counter() - begun
    done.set()
    watcher.join()
    values = {"s": seconds, "mb": tree_bytes(folder / "out") / 1e6, "anon_base_mib": base, "anon_peak_mib": max(anonymous),
              "rss_peak_mib": status("VmHWM")}  # fmt: skip
    print("RESULT " + json.dumps(values), flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="the Python of a venv with the original DeepSpeed")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--consolidate", metavar="WIDTHxLAYERS")
    parser.add_argument("--role", choices=["ours", "peer", "make", "export"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role in ("ours", "peer"):
        contest(options.folder, options.rounds, options.role == "peer")
    elif options.role == "make":
        width, layers = map(int, options.consolidate.split("x"))
        engine = engine_for(width, layers, 3, {})
        engine.save_checkpoint(str(options.folder / "ckpt"))
        numel = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
        print("RESULT " + json.dumps({"numel": numel}), flush=True)
        os._exit(0)
    elif options.role == "export":
        export(options.folder)
    else:
        folder = Path(tempfile.mkdtemp(prefix="ckpt-bench-", dir=options.folder))
        common = ["--folder", str(folder), "--rounds", str(options.rounds)]
        try:
            if options.consolidate:
                common += ["--consolidate", options.consolidate]
                print(run_ranks(sys.executable, [*common, "--role", "make"], 1), flush=True)
                print(run_ranks(sys.executable, [*common, "--role", "export"], 1), flush=True)
                return
            show("this package", run_ranks(sys.executable, [*common, "--role", "ours"], 2))
            if options.peer:
                shutil.rmtree(folder)
                folder.mkdir()
                show("DeepSpeed", run_ranks(options.peer, [*common, "--role", "peer"], 2))
        finally:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
