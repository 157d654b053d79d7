"""CPU optimizer steps beside memory bandwidth, torch's fused AdamW and DeepSpeed's DeepSpeedCPUAdam, in one run.

    python benchmarks/cpu_optimizers.py [--numel 100_000_000] [--rounds 15] [--peer PYTHON-with-deepspeed-0.19.8]

Contestants step in turn, A B C A B C, so that whatever else the machine does hits all of them. GB/s counts the bytes an
algorithm must move: each tensor it reads, once, and each it writes, once (AdamW in fp32: 28 per element). "copy" is
`y.copy_(x)` counted the same way, 8 bytes per element, although the processor also reads y before it writes; "add" is
`y.add_(x)`, 12 bytes per element, all of which move, and so the stricter measure. `low` also writes bf16 parameters: in the
same pass here, by `copy_` after the step for the others. The last table is each AdamW's distance from one in float64.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.kernels import native
from deepspeed.optim import (
    DeepSpeedCPUAdagrad,
    DeepSpeedCPUAdam,
    DeepSpeedCPULion,
    DeepSpeedCPUSGD,
    FusedLamb,
    FusedRun,
)

Step = Callable[[], object]
"""Takes one step; returns its seconds as a float where it took them itself."""

ADAMW: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01}

PEER = """
import sys, time, torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
numel = int(sys.argv[1])
p = torch.nn.Parameter(torch.full((numel,), 0.5)); p.grad = torch.full((numel,), 1e-3)
low = torch.zeros(numel, dtype=torch.bfloat16)
optimizer = DeepSpeedCPUAdam([p], lr=1e-3, weight_decay=0.01)
optimizer.step()
print("ready", flush=True)
for line in sys.stdin:
    threads, has_copy = map(int, line.split())
    torch.set_num_threads(threads)
    begun = time.perf_counter()
    optimizer.step()
    if has_copy:
        low.copy_(p.detach())
    print(time.perf_counter() - begun, flush=True)
"""


class Tensors:
    """The tensors that all contestants in this process step on."""

    def __init__(self, numel: int) -> None:
        self.param = nn.Parameter(torch.full((numel,), 0.5))
        self.grad = torch.full((numel,), 1e-3)
        self.low_grad = self.grad.bfloat16()
        self.low = torch.zeros(numel, dtype=torch.bfloat16)
        self.state = {key: torch.zeros(numel) for key in ("exp_avg", "exp_avg_sq")}


def fused(tensors: Tensors, optimizer: Any, low: Tensor | None = None, grad: Tensor | None = None) -> Step:
    """A step of one of our optimizers on the shared tensors."""
    (group,) = optimizer.param_groups
    names = zip(optimizer.state_names, tensors.state.values(), strict=False)
    optimizer.state[tensors.param] = {"step": torch.zeros(()), **dict(names)}
    run = FusedRun(tensors.param, tensors.grad if grad is None else grad, low)
    return lambda: optimizer.step_fused([(group, run)], 1.0)


def torch_adamw(tensors: Tensors, has_copy: bool) -> Step:
    """torch.optim.AdamW(fused=True) on the shared tensors, then a cast."""
    optimizer = torch.optim.AdamW([tensors.param], fused=True, **ADAMW)
    optimizer.state[tensors.param] = {"step": torch.zeros(()), **tensors.state}

    def step() -> None:
        tensors.param.grad = tensors.grad
        optimizer.step()
        if has_copy:
            tensors.low.copy_(tensors.param.detach())

    return step


@contextlib.contextmanager
def peer(python: str | None, numel: int) -> Iterator[dict[str, tuple[float, Step]]]:
    """DeepSpeed's contestants, in a process of their own."""
    if python is None:
        yield {}
        return
    command, pipe = [python, "-c", PEER, str(numel)], subprocess.PIPE
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None
        while (line := stdout.readline()).strip() != "ready":
            assert line, "the peer ended before it was ready"

        def step(has_copy: int) -> float:
            stdin.write(f"{torch.get_num_threads()} {has_copy}\n")
            stdin.flush()
            return float(stdout.readline())

        yield {"DeepSpeedCPUAdam 0.19.8": (28, lambda: step(0)), "DeepSpeedCPUAdam 0.19.8, low": (30, lambda: step(1))}
        stdin.close()


def contestants(tensors: Tensors) -> dict[str, tuple[float, Step]]:
    """Name: bytes per element that must move, and a step."""
    p, low = [tensors.param], tensors.low
    x, y = torch.zeros_like(tensors.grad), torch.zeros_like(tensors.grad)
    found: dict[str, tuple[float, Step]] = {
        "copy": (8, lambda: y.copy_(x)),
        "add": (12, lambda: y.add_(x)),
        "AdamW": (28, fused(tensors, DeepSpeedCPUAdam(p, **ADAMW))),
        "torch AdamW(fused)": (28, torch_adamw(tensors, False)),
        "AdamW, low": (30, fused(tensors, DeepSpeedCPUAdam(p, **ADAMW), low)),
        "torch AdamW(fused), low": (30, torch_adamw(tensors, True)),
        "AdamW, bf16 gradients, low": (28, fused(tensors, DeepSpeedCPUAdam(p, **ADAMW), low, tensors.low_grad)),
        "Lion, low": (22, fused(tensors, DeepSpeedCPULion(p, lr=1e-4), low)),
        "Adagrad, low": (22, fused(tensors, DeepSpeedCPUAdagrad(p), low)),
        "SGD with momentum, low": (22, fused(tensors, DeepSpeedCPUSGD(p, momentum=0.9), low)),
        "LAMB, low": (42, fused(tensors, FusedLamb(p), low)),
    }
    for isa in native.isas()[1:]:
        found[f"AdamW, low, {isa}"] = (30, _on(isa, found["AdamW, low"][1]))
    return found


def _on(isa: str, step: Step) -> Step:
    def run() -> None:
        native.use_isa(isa)
        step()
        native.use_isa()

    return run


def measure(entries: dict[str, tuple[float, Step]], numel: int, rounds: int) -> None:
    """One table at the present number of threads."""
    seconds: dict[str, list[float]] = {name: [] for name in entries}
    for _ in range(rounds + 1):
        for name, (_, step) in entries.items():
            begun = time.perf_counter()
            own = step()
            seconds[name].append(own if isinstance(own, float) else time.perf_counter() - begun)
    seconds = {name: times[1:] for name, times in seconds.items()}
    gb_s = {name: [entries[name][0] * numel / s / 1e9 for s in times] for name, times in seconds.items()}
    print(f"\n{torch.get_num_threads()} thread(s)\n")
    print("| | best ms | median ms | best GB/s | of copy, best | of copy, median of rounds | of add, best |")
    print("|---|---|---|---|---|---|---|")
    for name, times in seconds.items():
        of_copy = statistics.median(a / b for a, b in zip(gb_s[name], gb_s["copy"], strict=True))
        best = max(gb_s[name])
        print(
            f"| {name} | {min(times) * 1e3:.1f} | {statistics.median(times) * 1e3:.1f} | {best:.1f} "
            f"| {best / max(gb_s['copy']):.2f} | {of_copy:.2f} | {best / max(gb_s['add']):.2f} |"
        )
    for ours, theirs in (("AdamW", "torch AdamW(fused)"), ("AdamW", "DeepSpeedCPUAdam 0.19.8")):
        for suffix in ("", ", low"):
            if theirs + suffix in seconds:
                pairs = zip(seconds[ours + suffix], seconds[theirs + suffix], strict=True)
                ratios = sorted(a / b for a, b in pairs)
                print(
                    f"\n{ours}{suffix} takes {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}) "
                    f"of the time of {theirs}{suffix}."
                )


def errors(num_steps: int, numel: int = 1_000_000) -> None:
    """Greatest and mean error of AdamW's parameters against float64, relative to |p| + lr."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(numel, generator=generator) * 0.05
    params = [nn.Parameter(start.clone()), nn.Parameter(start.clone()), nn.Parameter(start.double())]
    optimizers = [
        DeepSpeedCPUAdam(params[:1], **ADAMW),
        torch.optim.AdamW(params[1:2], fused=True, **ADAMW),
        torch.optim.AdamW(params[2:], foreach=False, **ADAMW),
    ]
    for _ in range(num_steps):
        scale = 10 ** torch.empty(numel).uniform_(-6, 0, generator=generator)
        grad = torch.randn(numel, generator=generator) * scale
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = grad.to(param.dtype)
            optimizer.step()
    exact = params[2].detach()
    for name, param in (("AdamW", params[0]), ("torch AdamW(fused)", params[1])):
        error = (param.detach().double() - exact).abs() / (exact.abs() + ADAMW["lr"])
        print(f"| {num_steps} | {name} | {error.max():.2e} | {error.mean():.2e} |")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--numel", type=int, default=100_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--peer", help="the Python of an environment with deepspeed 0.19.8")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, instruction sets {', '.join(native.isas())}, {args.numel:,} elements")
    with peer(args.peer, args.numel) as theirs:
        entries = contestants(Tensors(args.numel)) | theirs
        for num_threads in args.threads:
            torch.set_num_threads(num_threads)
            measure(entries, args.numel, args.rounds)
    print("\n| steps | | greatest error | mean error |\n|---|---|---|---|")
    for num_steps in (1, 10, 100):
        errors(num_steps)


if __name__ == "__main__":
    main()
