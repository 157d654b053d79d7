"""Time of one training step: every ZeRO stage beside PyTorch's own DDP and FSDP2, in one run.

    python benchmarks/step_time.py [--model gpt|gpt24|gpt100|layers] [--ranks 2] [--steps 20] [--rounds 3]

Each engine trains the same model on the same data, in fp32 with AdamW and clipping, in processes of its own, one engine
after another; the rounds interleave them, and the best median counts, so that what else the machine does falls on all
alike. `gpt` is the example's model: arithmetic decides. `layers` is 200 small layers: the framework's overhead decides.
`gpt24` and `gpt100` have 24M and 98M parameters: what a process holds at most while it steps decides (the first step, which makes the
optimizer's state, is not counted). The CPU time of setting up is that of `deepspeed.initialize`, or of the wrapper and optimizer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
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
WIDTHS = {"gpt": (384, 6, 256), "gpt24": (512, 5, 8192), "gpt100": (768, 12, 8192)}
"""Width, layers, vocabulary."""


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

    width, layers, vocab = WIDTHS[name]
    config = GptConfig(vocab=vocab, width=width, layers=layers, heads=width // 64)
    tokens = torch.randint(vocab, (4, 65), device=device)
    return Gpt(config).to(device), (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


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


def ddp(model: nn.Module) -> nn.Module:
    """In its thriftiest form: gradients are views of its buckets."""
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


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
    "DDP": lambda model: torch_step(model, ddp),
    "ZeRO-1": lambda model: zero_step(model, 1),
    "ZeRO-2": lambda model: zero_step(model, 2),
    "ZeRO-3": lambda model: zero_step(model, 3),
    "FSDP2": lambda model: torch_step(model, fsdp2),
}


def measure(engine: str, case: str, steps: int) -> None:
    """One rank of one measurement; rank 0 prints the median milliseconds of a step, the process's peak in MB, and the CPU
    seconds of setting up."""
    has_cuda = torch.cuda.is_available()
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local_rank) if has_cuda else torch.device("cpu")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    dist.init_process_group("nccl" if has_cuda else "gloo")
    model, batch = make_case(case, device)
    before = time.process_time()
    step = ENGINES[engine](model)
    setup_s = time.process_time() - before
    times = []
    for number in range(WARMUP_STEPS + steps):
        if number == 1:
            forget_peak()
        start = time.perf_counter()
        step(batch)
        if has_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        ms = 1e3 * statistics.median(times[WARMUP_STEPS:])
        print(json.dumps({"ms": ms, "mb": peak_mb(), "setup_s": setup_s}), flush=True)
    dist.barrier()
    os._exit(0)  # engines differ in how they take themselves down, which is not what is measured


def forget_peak() -> None:
    """Have Linux measure the resident set's peak from now on."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    """The most that was resident in this process since `forget_peak`; nan where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM")), math.nan)


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


def run(engine: str, args: argparse.Namespace) -> dict[str, float]:
    """What `measure` prints of one engine, in fresh processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
    mine = [__file__, "--engine", engine, "--model", args.model, "--steps", str(args.steps)]
    done = subprocess.run([*launch, *mine], capture_output=True, text=True, env={"OMP_NUM_THREADS": "1", **os.environ})
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(f"{engine} failed:\n{done.stderr[-4000:]}")
    return dict(json.loads(lines[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*WIDTHS, "layers"], default="gpt")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", choices=ENGINES, help="measure one engine, as a rank")
    args = parser.parse_args()
    if args.engine:
        measure(args.engine, args.model, args.steps)
    print(conditions(), flush=True)
    found: dict[str, list[dict[str, float]]] = {engine: [] for engine in ENGINES}
    for _ in range(args.rounds):
        for engine in ENGINES:
            found[engine].append(run(engine, args))
    print(
        f"| {args.model}, {args.ranks} ranks | ms per step | peak MB of a rank | CPU s to set up |\n|---|--:|--:|--:|"
    )
    for engine, rounds in found.items():
        ms, setup_s = (min(one[name] for one in rounds) for name in ("ms", "setup_s"))
        mb = statistics.median(one["mb"] for one in rounds)
        print(f"| {engine} | {ms:.1f} | {mb:.0f} | {setup_s:.2f} |")


if __name__ == "__main__":
    main()
