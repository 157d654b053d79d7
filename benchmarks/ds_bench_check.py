"""`ds_bench` beside a hand-written loop over torch.distributed: do they measure the same?

    deepspeed --num_gpus 2 benchmarks/ds_bench_check.py

Both take turns, five times; medians, in GB/s of algorithm bandwidth. See README.md.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.distributed as dist

from deepspeed import comm
from deepspeed.comm.bench import make_call, measure_s

TRIALS, WARMUPS, TURNS = 10, 3, 5


def by_hand_s(name: str, numel: int) -> float:
    """Seconds per call, written as one would."""
    world = dist.get_world_size()
    full, mine = torch.ones(numel), torch.ones(numel // world)
    for trial in range(WARMUPS + TRIALS):
        if trial == WARMUPS:
            dist.barrier()
            start_s = time.perf_counter()
        if name == "all_reduce":
            dist.all_reduce(full)
        elif name == "all_gather":
            dist.all_gather_into_tensor(full, mine)
        else:
            dist.broadcast(full, 0)
    took = torch.tensor((time.perf_counter() - start_s) / TRIALS, dtype=torch.float64)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return float(took)


def main() -> None:
    """Print one line per operation and size."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.parse_args()
    comm.init_distributed(verbose=False)
    for name in ("all_reduce", "all_gather", "broadcast"):
        for numel in (1 << 12, 1 << 16, 1 << 20, 1 << 23):
            ours, hand = [], []
            for _ in range(TURNS):
                call = make_call(name, numel, torch.float32, torch.device("cpu"), comm)
                ours.append(numel * 4 / measure_s(call, TRIALS, WARMUPS, False, torch.device("cpu")) / 1e9)
                hand.append(numel * 4 / by_hand_s(name, numel) / 1e9)
            if dist.get_rank() == 0:
                a, b = statistics.median(ours), statistics.median(hand)
                spread = f"{min(hand):.3f}-{max(hand):.3f}"
                print(f"{name:<12}{numel * 4:>10} B  ds_bench {a:7.3f}  by hand {b:7.3f} ({spread})  ratio {a / b:.2f}")
    comm.destroy_process_group()


if __name__ == "__main__":
    main()
