"""`deepspeed max-batch MODEL -c ds.json -m GIB`: the largest micro-batch that fits, found by prediction alone.

Two traces tell the memory of every size (`memory.scaling`), so doubling and bisection cost milliseconds a step. No trial runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from deepspeed.config import read_config
from deepspeed.config.dotted import with_values
from deepspeed.memory.cli import build, gib
from deepspeed.memory.scaling import BatchEstimator
from deepspeed.utils.arguments import amount, whole
from deepspeed.utils.errors import DeepSpeedError

GIB = 2**30
MOST = 1 << 20
"""Samples beyond which nobody asks."""


def largest(fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to `MOST` for which `fits` holds, if it holds below; 0 if not even for 1. About 2 log2 calls."""
    high = 1
    while high < MOST and fits(high):
        high *= 2
    if high == MOST and fits(MOST):
        return MOST
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_batch(
    model: Any, config: Any, batch: Any, *, micro: int, ranks: int, room: int, device_type: str
) -> tuple[int, int]:
    """(samples, bytes) of the largest micro-batch that fits `room` bytes; (0, bytes of one) if none does."""
    given = with_values(read_config(config), {"train_batch_size": None, "train_micro_batch_size_per_gpu": micro})
    estimator = BatchEstimator(model, batch, micro, device_type=device_type)

    def needed(size: int) -> int:
        found = estimator.estimate(given, micro=size, world_size=ranks, bounds=False)
        return found.peak_nbytes + (found.allowance_nbytes if device_type != "cpu" else 0)

    size = largest(lambda number: needed(number) <= room)
    return size, needed(max(1, size))


def add_arguments(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Those that both commands have."""
    made.add_argument("-c", "--config", help="the DeepSpeed configuration (JSON); default: AdamW in bf16, stage 0")
    made.add_argument("-n", "--ranks", type=whole, default=1, help="data-parallel ranks (%(default)s)")
    made.add_argument("-s", "--seq", type=whole, default=1024, help="tokens per sample (%(default)s)")
    made.add_argument("--device", default="cuda", help="what ranks compute on: cuda, cpu, ... (%(default)s)")
    made.add_argument("-m", "--device-memory", type=amount, metavar="GIB", required=True, help="memory of a device")
    return made


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(
        prog="deepspeed max-batch", description="The largest micro-batch of a model that fits."
    )
    made.add_argument("model", help="a Hugging Face config.json or its folder; or file.py:function, module:function")
    return add_arguments(made)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 1 where not even one sample fits."""
    args = parser().parse_args(arguments)
    try:
        config = read_config(args.config) if args.config else {"bf16": {"enabled": True}}
        model, batch = build(args.model, 2, args.seq)
        room = int(args.device_memory * GIB)
        size, needed = largest_batch(
            model, config, batch, micro=2, ranks=args.ranks, room=room, device_type=args.device
        )
    except DeepSpeedError as error:
        print(f"deepspeed max-batch: {error}", file=sys.stderr)
        return 2
    if not size:
        print(
            f"Not even one sample fits {args.device_memory:g} GiB: it needs {gib(needed)}. `deepspeed estimate` has what to change."
        )
        return 1
    end = f"{size + 1} does not fit" if size < MOST else "more was not asked about"
    print(f"train_micro_batch_size_per_gpu: {size}\nA rank needs {gib(needed)} of {args.device_memory:g} GiB; {end}.")
    return 0
