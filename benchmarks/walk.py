"""How far a reader walks: calls, functions, files and depth inside of the package during one training step.

    python benchmarks/walk.py [--stages 2 3] [--ranks 2] [--step 6]

A profile hook over a real step on gloo ranks, in bf16: two blocks of two Linear, and a head; three buckets at stage 3.
Depth counts frames of the package alone. What widens products on CPUs (`precision.widen`) is left out: other devices do
not pass there. Another version is measured with PYTHONPATH on its sources.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import deepspeed

PACKAGE = str(Path(deepspeed.__file__).parent)
LEFT_OUT = (str(Path(PACKAGE, "precision", "widen.py")), str(Path(PACKAGE, "utils", "nvtx.py")))


class Walk:
    """Counts calls into the package while it is entered."""

    def __init__(self) -> None:
        self.calls = self.depth = self.max_depth = 0
        self.functions: set[tuple[str, int]] = set()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        name = frame.f_code.co_filename
        if event not in ("call", "return") or not name.startswith(PACKAGE) or name.startswith(LEFT_OUT):
            return
        self.depth += 1 if event == "call" else -1
        if event == "call":
            self.calls += 1
            self.functions.add((name, frame.f_code.co_firstlineno))
            self.max_depth = max(self.max_depth, self.depth)

    def __enter__(self) -> Walk:
        sys.setprofile(self)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)

    def row(self) -> str:
        """calls, distinct functions, files, greatest depth."""
        files = {name for name, _ in self.functions}
        return f"{self.calls:5d} {len(self.functions):10d} {len(files):6d} {self.max_depth:6d}"


class Block(nn.Module):
    """Two Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, width]."""
        return x + self.down(torch.relu(self.up(x)))


def engine_at(stage: int) -> Any:
    """The engine that is walked through."""
    model = nn.Sequential(Block(64), Block(64), nn.Linear(64, 64))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "steps_per_print": 0,
    }
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def watched(engine: Any, step: int) -> dict[str, Walk]:
    """Train up to `step`; that one's walks, by phase."""
    walks: dict[str, Walk] = defaultdict(Walk)
    for number in range(1, step + 1):
        batch = torch.randn(2, 64, dtype=torch.bfloat16)
        if number < step:
            engine.backward(engine(batch).float().pow(2).mean())
            engine.step()
            continue
        with walks["forward"]:
            output = engine(batch)
        loss = output.float().pow(2).mean()
        with walks["backward"]:
            engine.backward(loss)
        with walks["step"]:
            engine.step()
    return walks


def one_rank(rank: int, ranks: int, stage: int, port: int, step: int) -> None:
    """Train up to the step that is watched; rank 0 prints."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.manual_seed(0)
    torch.set_num_threads(1)
    walks = watched(engine_at(stage), step)
    if rank == 0:
        for phase, walk in walks.items():
            print(f"stage {stage} {phase:9s} {walk.row()}", flush=True)
    torch.distributed.destroy_process_group()


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--step", type=int, default=6, help="which step is watched (default: 6)")
    args = parser.parse_args()
    print("                  calls  functions  files  depth")
    for stage in args.stages:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.spawn(one_rank, (args.ranks, stage, port, args.step), nprocs=args.ranks)


if __name__ == "__main__":
    main()
