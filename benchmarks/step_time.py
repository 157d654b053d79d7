"""Time of one training step: every ZeRO stage beside PyTorch's own DDP and FSDP2, in one run.

    python benchmarks/step_time.py [--model gpt|layers] [--ranks 2] [--steps 20] [--rounds 3]

Each engine trains the same model on the same data, in fp32 with AdamW and clipping, in processes of its own, one engine
after another; the rounds interleave them, and the best median counts, so that what else the machine does falls on all
alike. `gpt` is the example's model: arithmetic decides. `layers` is 200 small layers: the framework's overhead decides.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "gpt"))

LR, CLIP, WARMUP_STEPS = 1e-4, 1.0, 5
Step = Callable[[tuple[Tensor, Tensor]], None]


class Layers(nn.Module):
    """200 linear layers of width 64."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(200))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return nn.functional.mse_loss(x, y)


def make_case(name: str, device: torch.device) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A model and one micro-batch for it."""
    torch.manual_seed(0)
    if name == "layers":
        return Layers().to(device), (torch.randn(8, 64, device=device), torch.randn(8, 64, device=device))
    from model import Gpt, GptConfig

    tokens = torch.randint(256, (4, 65), device=device)
    return Gpt(GptConfig()).to(device), (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def zero_step(model: nn.Module, stage: int) -> Step:
    """A step of our engine."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": CLIP,
        "optimizer": {"type": "AdamW", "params": {"lr": LR}},
        "zero_optimization": {"stage": stage},
    }
    engine, _, _, _ = deepspeed.initialize(model=model, config=config)

    def step(batch: tuple[Tensor, Tensor]) -> None:
        engine.backward(engine(*batch))
        engine.step()

    return step


def torch_step(model: nn.Module, wrap: Callable[[nn.Module], Any]) -> Step:
    """A step of a model wrapped by DDP or FSDP2."""
    wrapped = wrap(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=LR, fused=True)

    def step(batch: tuple[Tensor, Tensor]) -> None:
        wrapped(*batch).backward()
        nn.utils.clip_grad_norm_(wrapped.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def fsdp2(model: nn.Module) -> nn.Module:
    """Sharded block by block, then the rest."""
    from torch.distributed.fsdp import fully_shard

    blocks = next(child for child in model.children() if isinstance(child, nn.ModuleList))
    per_unit = 1 if len(blocks) < 50 else 20
    for start in range(0, len(blocks), per_unit):
        fully_shard(list(blocks[start : start + per_unit]))
    fully_shard(model)
    return model


ENGINES: dict[str, Callable[[nn.Module], Step]] = {
    "ZeRO-0": lambda model: zero_step(model, 0),
    "DDP": lambda model: torch_step(model, nn.parallel.DistributedDataParallel),
    "ZeRO-1": lambda model: zero_step(model, 1),
    "ZeRO-2": lambda model: zero_step(model, 2),
    "ZeRO-3": lambda model: zero_step(model, 3),
    "FSDP2": lambda model: torch_step(model, fsdp2),
}


def measure(engine: str, case: str, steps: int) -> None:
    """One rank of one measurement; rank 0 prints the median milliseconds of a step."""
    has_cuda = torch.cuda.is_available()
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local_rank) if has_cuda else torch.device("cpu")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    dist.init_process_group("nccl" if has_cuda else "gloo")
    model, batch = make_case(case, device)
    step = ENGINES[engine](model)
    times = []
    for _ in range(WARMUP_STEPS + steps):
        start = time.perf_counter()
        step(batch)
        if has_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        print(json.dumps({"ms": 1e3 * statistics.median(times[WARMUP_STEPS:])}), flush=True)
    dist.barrier()
    os._exit(0)  # engines differ in how they take themselves down, which is not what is measured


def conditions() -> str:
    """Where these figures come from: machine, versions, commit."""
    root = Path(__file__).resolve().parents[1]
    try:
        git = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = models[0] if models else platform.machine()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    machine = f"{cpu}, {os.cpu_count()} cores" + "".join(f", {name}" for name in devices)
    return f"{machine}; Python {platform.python_version()}, torch {torch.__version__}; commit {commit}"


def run(engine: str, args: argparse.Namespace) -> float:
    """Milliseconds per step of one engine, measured in fresh processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
    mine = [__file__, "--engine", engine, "--model", args.model, "--steps", str(args.steps)]
    done = subprocess.run([*launch, *mine], capture_output=True, text=True, env={"OMP_NUM_THREADS": "1", **os.environ})
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(f"{engine} failed:\n{done.stderr[-4000:]}")
    return float(json.loads(lines[0])["ms"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["gpt", "layers"], default="gpt")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", choices=ENGINES, help="measure one engine, as a rank")
    args = parser.parse_args()
    if args.engine:
        measure(args.engine, args.model, args.steps)
    print(conditions(), flush=True)
    best = dict.fromkeys(ENGINES, float("inf"))
    for _ in range(args.rounds):
        for engine in ENGINES:
            best[engine] = min(best[engine], run(engine, args))
    print(f"| {args.model}, {args.ranks} ranks | ms per step |\n|---|---|")
    for engine, ms in best.items():
        print(f"| {engine} | {ms:.1f} |")


if __name__ == "__main__":
    main()
