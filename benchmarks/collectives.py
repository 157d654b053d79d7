"""ZeRO's verbs on CPUs: `SharedExchange`, `DirectExchange`, `CollectiveExchange` and torch's own collectives, side by side.

    python benchmarks/collectives.py [--ranks 2] [--repeat 9] [--dtype float32]

Milliseconds per call (median, the slowest rank's), one torch thread per rank, every line measured in turn on the same
processes. The last lines start 200 tiny messages and then wait for all of them, as a model of many small layers does.
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
NUM_TINY = 200


def _milliseconds(call: Callable[[], object], repeat: int) -> float:
    """The median over calls of the slowest rank's time."""
    times: list[float] = []
    for _ in range(repeat + 2):
        dist.barrier()
        start_s = time.perf_counter()
        call()
        elapsed = torch.tensor(time.perf_counter() - start_s)
        dist.all_reduce(elapsed, dist.ReduceOp.MAX)
        times.append(elapsed.item() * 1e3)
    return statistics.median(times[2:])


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


def _rank(rank: int, world_size: int, port: int, repeat: int, dtype_name: str, largest: int) -> None:
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
    for nbytes in (size for size in SIZES if size <= largest):
        shard_numel = nbytes // dtype.itemsize // world_size
        full, shard = torch.ones(shard_numel * world_size, dtype=dtype), torch.ones(shard_numel, dtype=dtype)
        for verb in ("all_gather", "reduce_scatter", "all_reduce"):
            measured = [_milliseconds(_calls(e, full, shard)[verb], repeat) for e in columns.values()]
            line(f"{verb} {nbytes >> 10} KB", measured)
    pairs = [(torch.ones(64 * world_size, dtype=dtype), torch.ones(64, dtype=dtype)) for _ in range(NUM_TINY)]
    line(f"{NUM_TINY} tiny reduce_scatters", [_milliseconds(_tiny(e, pairs), repeat) for e in columns.values()])
    dist.destroy_process_group()


def main() -> int:
    """Start the ranks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="bytes of the largest buffer")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    args = parser.parse_args()
    torch.multiprocessing.spawn(
        _rank, (args.ranks, free_port(), args.repeat, args.dtype, args.largest), nprocs=args.ranks
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
