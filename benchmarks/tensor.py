"""Layers cut over two ranks: ours beside a split written by hand and beside DTensor, in one run.

    python benchmarks/tensor.py [--layers 8] [--width 128] [--tokens 64] [--rounds 15]

Two gloo processes, one thread each. Forward and backward of gated MLPs with residual sums; all three compute the same loss, which is
checked first. Processor time of a rank, since what a layer costs beside its products is the host's; rounds of all take turns, the
least of each counts. "By hand": Megatron-LM's f and g as two autograd functions around `F.linear`, nothing else.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from deepspeed.parallel.tensor.apply import carry_out, draw
from deepspeed.parallel.tensor.choose import Wishes
from deepspeed.parallel.tensor.collectives import TensorGroup
from deepspeed.parallel.tensor.rules import Action, Spec

WORLD = 2


class Enter(torch.autograd.Function):
    """f: gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class Leave(torch.autograd.Function):
    """g: outputs are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Mlp(nn.Module):
    """A gated MLP with its residual sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, 4 * width, bias=False), nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, width] to [tokens, width]."""
        out: Tensor = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class ByHand(Mlp):
    """The rank's part, and the two collectives."""

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, width] to [tokens, width]."""
        entered = Enter.apply(x)
        out: Tensor = x + Leave.apply(self.down(F.silu(self.gate(entered)) * self.up(entered)))
        return out


def stack(kind: type[Mlp], layers: int, width: int) -> nn.Sequential:
    """The same values for everyone."""
    torch.manual_seed(0)
    return nn.Sequential(*(kind(width) for _ in range(layers)))


def make(name: str, rank: int, layers: int, width: int) -> nn.Module:
    """One of the three, cut."""
    model = stack(ByHand if name == "by hand" else Mlp, layers, width)
    mlps: list[Any] = list(model)
    if name == "by hand":
        half = 4 * width // WORLD
        own = slice(rank * half, (rank + 1) * half)
        for mlp in mlps:
            for layer in (mlp.gate, mlp.up):
                layer.weight = nn.Parameter(layer.weight.detach()[own].clone())
            mlp.down.weight = nn.Parameter(mlp.down.weight.detach()[:, own].clone())
    elif name == "ours":
        specs = (Spec((r".*\.(gate|up)\.weight",), Action.COLUMN), Spec((r".*\.down\.weight",), Action.ROW))
        ranks = TensorGroup(dist.group.WORLD, rank, WORLD)
        carry_out(model, ranks, draw(model, ranks, Wishes(specs=specs))[1], lambda param: None)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        plan = {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
        mesh = init_device_mesh("cpu", (WORLD,))
        for mlp in mlps:
            parallelize_module(mlp, mesh, plan)
    return model


def step(model: nn.Module, x: Tensor) -> tuple[float, float, float]:
    """Loss, processor seconds and seconds of a forward and backward."""
    model.zero_grad()
    cpu, clock = time.process_time(), time.perf_counter()
    loss = model(x).square().mean()
    loss.backward()
    return float(loss), time.process_time() - cpu, time.perf_counter() - clock


def measure(rank: int, port: int, layers: int, width: int, tokens: int, rounds: int, answer: Any) -> None:
    """A rank."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    models = {name: make(name, rank, layers, width) for name in ("by hand", "ours", "DTensor")}
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1)).requires_grad_()
    losses = {name: [step(model, x)[0] for _ in range(2)][1] for name, model in models.items()}
    assert max(losses.values()) - min(losses.values()) < 1e-5 * max(losses.values()), losses
    best = {name: (float("inf"), float("inf")) for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            _, cpu, clock = step(model, x)
            best[name] = (min(best[name][0], cpu), min(best[name][1], clock))
    if rank == 0:
        answer.put(best)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--port", type=int, default=29611)
    args = parser.parse_args()
    answer: Any = mp.get_context("spawn").SimpleQueue()
    mp.spawn(measure, (args.port, args.layers, args.width, args.tokens, args.rounds, answer), nprocs=WORLD)
    best = answer.get()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, commit {commit}, {args}")
    print(f"{'':10}{'processor ms':>14}{'ms':>10}{'of by hand':>12}{'of DTensor':>12}")
    for name, (cpu, clock) in best.items():
        ratios = (cpu / best["by hand"][0], cpu / best["DTensor"][0])
        print(f"{name:10}{cpu * 1e3:14.2f}{clock * 1e3:10.2f}{ratios[0]:12.2f}{ratios[1]:12.2f}")


if __name__ == "__main__":
    main()
