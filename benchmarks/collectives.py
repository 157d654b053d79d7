"""ZeRO's verbs on CPUs: `SharedExchange`, `DirectExchange`, `CollectiveExchange` and torch's own collectives, side by side.

    python benchmarks/collectives.py [--ranks 2] [--repeat 9] [--dtype float32] [--fastest]

Milliseconds per call, the slowest rank's, one torch thread per rank, every line measured in turns on the same processes. What is
small is called `NUM_CALLS` times one after the other, for their mean: after a barrier, the first call would be the time until
the other rank runs. The median of `--repeat`, and with `--fastest` what a tenth of them stays below: other programs make
calls slower, never faster. The last line starts 200 tiny messages and then waits for all of them, as a model of many small layers does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from deepspeed.comm.choose import Sharing, make_exchange
from deepspeed.comm.collective import CollectiveExchange, all_gather_single, reduce_scatter_single
from deepspeed.comm.direct import DirectExchange
from deepspeed.comm.exchange import Exchange
from deepspeed.utils.ports import free_port

SIZES = (4 << 10, 64 << 10, 256 << 10, 1 << 20, 16 << 20, 64 << 20)
"""Bytes of the full buffer."""
SMALL_NBYTES = 1 << 18
NUM_CALLS = 20
NUM_TINY = 200


def _milliseconds(calls: list[Callable[[], object]], num_calls: int, repeat: int, fastest: bool) -> list[float]:
    """Of each, in turns, so many calls one after the other."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeat + 2):
        for taken, call in zip(times, calls, strict=True):
            dist.barrier()
            call()
            start_s = time.perf_counter()
            for _ in range(num_calls):
                call()
            elapsed = torch.tensor(time.perf_counter() - start_s)
            dist.all_reduce(elapsed, dist.ReduceOp.MAX)
            taken.append(elapsed.item() / num_calls * 1e3)
    return [(_tenth if fastest else statistics.median)(taken[2:]) for taken in times]


def _tenth(times: list[float]) -> float:
    return sorted(times)[len(times) // 10]


def _calls(exchange: Exchange | None, full: Tensor, shard: Tensor) -> dict[str, Callable[[], object]]:
    """The three verbs on one size; torch's where there is no exchange."""
    world_size = dist.get_world_size()
    if exchange is None:
        return {
            "all_gather": lambda: all_gather_single(full, shard),
            "reduce_scatter": lambda: (reduce_scatter_single(shard, full), shard.div_(world_size)),
            "all_reduce": lambda: (dist.all_reduce(full), full.div_(world_size)),
        }
    return {
        "all_gather": lambda: exchange.start_all_gather(full, None).wait(),
        "reduce_scatter": lambda: exchange.start_reduce_scatter(
            full, shard, divide_by=world_size, accumulate=False
        ).wait(),
        "all_reduce": lambda: exchange.start_all_reduce(full, world_size).wait(),
    }


def _tiny(exchange: Exchange | None, pairs: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    def start(full: Tensor, shard: Tensor) -> object:
        if exchange is None:
            return reduce_scatter_single(shard, full, async_op=True)
        return exchange.start_reduce_scatter(full, shard, divide_by=1, accumulate=False)

    def run() -> None:
        for pending in [start(full, shard) for full, shard in pairs]:
            pending.wait()  # type: ignore[attr-defined]

    return run


def _rank(rank: int, port: int, args: argparse.Namespace) -> None:
    world_size, dtype_name = args.ranks, args.dtype
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    dtype: torch.dtype = getattr(torch, dtype_name)
    columns: dict[str, Exchange | None] = {
        "shared": make_exchange(group, torch.device("cpu"), sharing=Sharing.ALWAYS),
        "direct": DirectExchange(group),
        "collective": CollectiveExchange(group),
        "torch": None,
    }

    def line(name: str, milliseconds: list[float]) -> None:
        if rank == 0:
            print(f"{name:<34}" + "".join(f"{ms:>14.3f}" for ms in milliseconds), flush=True)

    if rank == 0:
        print(f"{world_size} ranks, {dtype_name}, ms per call" + " " * 4 + "".join(f"{name:>14}" for name in columns))
    for nbytes in (size for size in SIZES if size <= args.largest):
        shard_numel = nbytes // dtype.itemsize // world_size
        full, shard = torch.ones(shard_numel * world_size, dtype=dtype), torch.ones(shard_numel, dtype=dtype)
        for verb in ("all_gather", "reduce_scatter", "all_reduce"):
            calls = [_calls(e, full, shard)[verb] for e in columns.values()]
            num_calls = NUM_CALLS if nbytes <= SMALL_NBYTES else 1
            line(f"{verb} {nbytes >> 10} KB", _milliseconds(calls, num_calls, args.repeat, args.fastest))
    pairs = [(torch.ones(64 * world_size, dtype=dtype), torch.ones(64, dtype=dtype)) for _ in range(NUM_TINY)]
    tiny = _milliseconds([_tiny(e, pairs) for e in columns.values()], 1, args.repeat, args.fastest)
    line(f"{NUM_TINY} tiny reduce_scatters", tiny)
    dist.destroy_process_group()


def main() -> int:
    """Start the ranks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="bytes of the largest buffer")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--fastest", action="store_true", help="what a tenth of the calls stays below, not the median")
    args = parser.parse_args()
    torch.multiprocessing.spawn(_rank, (free_port(), args), nprocs=args.ranks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
