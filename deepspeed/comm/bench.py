"""How fast collectives are: a sweep over operations and message sizes, inside a job. `ds_bench` starts it.

    python -m deepspeed.comm.bench [flags]          in every rank; `ds_bench` launches that

Each figure is the mean over `trials` calls one after the other, after `warmups`, on the slowest rank. Algorithm
bandwidth is message bytes / time; bus bandwidth scales it to what a link carries (`recorder.bus_factor`). The message of
an all-gather, a reduce-scatter or an all-to-all is the full buffer over all ranks. Source: nccl-tests, PERFORMANCE.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.recorder import bus_factor, size_text
from deepspeed.utils.errors import DeepSpeedError

OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "pt2pt")
DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64", "int32", "int8")}


def make_parser() -> argparse.ArgumentParser:
    """The flags, which `ds_bench` passes on."""
    parser = argparse.ArgumentParser(prog="ds_bench", description="Measure the bandwidth of collectives.")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    parser.add_argument("--trials", type=int, default=5, help="calls that are timed (%(default)s)")
    parser.add_argument("--warmups", type=int, default=2, help="calls before them (%(default)s)")
    parser.add_argument("--minsize", type=int, default=10, help="smallest message: 2**N elements (%(default)s)")
    parser.add_argument("--maxsize", type=int, default=24, help="largest message: 2**N elements (%(default)s)")
    parser.add_argument("--scan", action="store_true", help="every power of two between them, not every second")
    parser.add_argument("--async-op", action="store_true", help="start all trials before waiting for them")
    parser.add_argument("--bw-unit", choices=("Gbps", "GBps"), default="Gbps")
    parser.add_argument("--backend", help="of torch.distributed; by default the accelerator's")
    parser.add_argument("--dist", choices=("deepspeed", "torch"), default="deepspeed", help="whose functions to call")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--mem-factor", type=float, default=0.3, help="share of device memory a message may take")
    parser.add_argument("--raw", action="store_true", help="plain numbers, no units")
    parser.add_argument("--debug", action="store_true", help="also say which ranks and devices take part")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    for name in OPERATIONS:
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help="only this (and others so named)")
    return parser


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked: `ds_bench` asks before it starts anything, so that no rank has to fail. Exits like argparse."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if not 0 <= args.minsize <= args.maxsize <= 40:
        parser.error(f"--minsize {args.minsize} and --maxsize {args.maxsize}: give 0 <= minsize <= maxsize <= 40")
    if args.trials < 1 or args.warmups < 0:
        parser.error(f"--trials {args.trials} and --warmups {args.warmups}: give at least 1 and 0")
    return args


def sizes(args: argparse.Namespace, world_size: int, element_nbytes: int) -> list[int]:
    """Message sizes in elements, each a multiple of the number of ranks."""
    limit = get_accelerator().total_memory() * args.mem_factor / element_nbytes
    powers = [*range(args.minsize, args.maxsize, 1 if args.scan else 2), args.maxsize]
    rounded = [max(1, 2**power // world_size) * world_size for power in powers]
    return sorted({numel for numel in rounded if numel <= limit})


def make_call(name: str, numel: int, dtype: torch.dtype, device: torch.device, lib: Any) -> Callable[..., Any]:
    """One call of an operation on a message of `numel` elements; takes async_op."""
    rank, world = dist.get_rank(), dist.get_world_size()
    full, other = (torch.ones(numel, dtype=dtype, device=device) for _ in range(2))
    mine = torch.ones(numel // world, dtype=dtype, device=device)
    if name == "all_gather":
        return lambda async_op: lib.all_gather_into_tensor(full, mine, async_op=async_op)
    if name == "reduce_scatter":
        return lambda async_op: lib.reduce_scatter_tensor(mine, full, async_op=async_op)
    if name == "all_to_all":
        return lambda async_op: lib.all_to_all_single(other, full, async_op=async_op)
    if name == "broadcast":
        return lambda async_op: lib.broadcast(full, 0, async_op=async_op)
    if name == "pt2pt":
        return lambda async_op: _ping(lib, full, rank)
    return lambda async_op: lib.all_reduce(full, async_op=async_op)


def _ping(lib: Any, tensor: Tensor, rank: int) -> None:
    """From rank 0 to rank 1; others look on."""
    if rank == 0:
        lib.send(tensor, 1)
    elif rank == 1:
        lib.recv(tensor, 0)


def measure_s(call: Callable[..., Any], trials: int, warmups: int, async_op: bool, device: torch.device) -> float:
    """Seconds per call on the slowest rank. Collective."""
    synchronize = get_accelerator().synchronize
    for _ in range(warmups):
        _finish(call(False))
    synchronize()
    dist.barrier()
    start_s = time.perf_counter()
    handles = [call(async_op) for _ in range(trials)]
    for handle in handles:
        _finish(handle)
    synchronize()
    took = torch.tensor([(time.perf_counter() - start_s) / trials], dtype=torch.float64, device=device)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return float(took.item())


def _finish(handle: Any) -> None:
    if handle is not None and not isinstance(handle, int):
        handle.wait()


def sweep(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One line per operation and size. Collective."""
    device = torch.device(get_accelerator().current_device_name())
    dtype, world = DTYPES[args.dtype], dist.get_world_size()
    chosen = [name for name in OPERATIONS if getattr(args, name)] or list(OPERATIONS)
    lib = comm if args.dist == "deepspeed" else dist
    for name in chosen:
        if name == "pt2pt" and world < 2:
            continue
        for numel in sizes(args, world, dtype.itemsize):
            call = make_call(name, numel, dtype, device, lib)
            took_s = measure_s(call, args.trials, args.warmups, args.async_op, device)
            nbytes = numel * dtype.itemsize
            algorithm = nbytes / took_s
            yield {
                "op": name,
                "nbytes": nbytes,
                "ms": took_s * 1e3,
                "algbw_GBps": algorithm / 1e9,
                "busbw_GBps": algorithm * bus_factor(name, world) / 1e9,
            }


def line_of(figure: dict[str, Any], unit: str, raw: bool) -> str:
    """A figure as a row of the table."""
    scale = 8 if unit == "Gbps" else 1
    size = str(figure["nbytes"]) if raw else size_text(figure["nbytes"])
    speeds = f"{figure['algbw_GBps'] * scale:>12.3f}{figure['busbw_GBps'] * scale:>12.3f}"
    return f"{figure['op']:<16}{size:>14}{figure['ms']:>12.3f}{speeds}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep in this rank; rank 0 prints, and writes the JSON."""
    args = parse_args(arguments)
    comm.init_distributed(dist_backend=args.backend, verbose=False)
    figures = []
    is_first = dist.get_rank() == 0
    if args.debug:
        print(f"rank {dist.get_rank()}: {platform.node()}, {get_accelerator().current_device_name()}", flush=True)
    if is_first and args.json and not args.json.absolute().parent.is_dir():
        raise DeepSpeedError(f"--json {args.json}: there is no directory {args.json.absolute().parent}.\n  Make it.")
    if is_first:
        print(f"{'op':<16}{'message':>14}{'ms':>12}{'alg ' + args.bw_unit:>12}{'bus ' + args.bw_unit:>12}")
    for figure in sweep(args):
        figures.append(figure)
        if is_first:
            print(line_of(figure, args.bw_unit, args.raw), flush=True)
    if is_first and args.json:
        about = {
            "world_size": dist.get_world_size(),
            "backend": dist.get_backend(),
            "dtype": args.dtype,
            "trials": args.trials,
            "torch": torch.__version__,
            "host": platform.node(),
        }
        args.json.write_text(json.dumps({**about, "figures": figures}, indent=1))
    comm.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
