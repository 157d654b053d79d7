"""A layer of experts beside a dense MLP of as many operations, and beside the plain loop of Hugging Face, in one run.

    python benchmarks/moe.py [--tokens 2048] [--width 512] [--rounds 7]

Forward and backward of one layer in one process, one thread; the dense layer is top-k times as wide inside as one expert. Rounds
of all take turns; `ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2` holds all of them to AVX2; processor time, the median of each, and of the rounds' ratios. "Loop": a plain loop over experts with index_add, written
here after what transformers' eager experts do.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspeed.kernels import native
from deepspeed.mesh.mesh import Mesh
from deepspeed.mesh.shape import MeshShape
from deepspeed.parallel.expert import hugging_face


class Dense(nn.Module):
    """A gated MLP."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[n, width] to [n, width]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


class Fused(nn.Module):
    """Matrices of all experts, as models of Hugging Face keep them; `forward` is their loop."""

    def __init__(self, num_experts: int, width: int, inner: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.randn(num_experts, 2 * inner, width) / width**0.5)
        self.down_proj = nn.Parameter(torch.randn(num_experts, width, inner) / inner**0.5)
        self.act_fn = F.silu

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """[n, width] to [n, width]."""
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            token, place = torch.where(chosen == e)
            gate, up = F.linear(x[token], self.gate_up_proj[e]).chunk(2, dim=-1)
            part = F.linear(F.silu(gate) * up, self.down_proj[e]) * weights[token, place, None]
            out.index_add_(0, token, part)
        return out


def step(call: Callable[[], Tensor], x: Tensor) -> float:
    """Seconds of the processor for a forward and backward."""
    x.grad = None
    start = time.process_time()
    result = call()
    result.backward(torch.ones_like(result))
    return time.process_time() - start


def compare(num_experts: int, top_k: int, tokens: int, width: int, inner: int, dtype: torch.dtype, rounds: int) -> str:
    """One line of the table."""
    torch.manual_seed(0)
    loop, ours = (Fused(num_experts, width, inner).to(dtype) for _ in range(2))
    hugging_face.convert(ours, "", Mesh(MeshShape(), 0), 0)
    dense = Dense(width, top_k * inner).to(dtype)
    router = nn.Linear(width, num_experts, bias=False)
    x = torch.randn(tokens, width).to(dtype).requires_grad_()

    def routed(experts: nn.Module) -> Tensor:
        weights, chosen = F.softmax(router(x.float()), dim=-1).topk(top_k, dim=-1)
        out: Tensor = experts(x, chosen, (weights / weights.sum(-1, keepdim=True)).to(dtype))
        return out

    calls = {"dense": lambda: dense(x), "ours": lambda: routed(ours), "loop": lambda: routed(loop)}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            for module in (dense, ours, loop):
                module.zero_grad()
            times[name].append(step(call, x))
    median = {name: statistics.median(each[1:]) for name, each in times.items()}
    ratio = {
        name: statistics.median(other / mine for other, mine in zip(times[name][1:], times["ours"][1:], strict=True))
        for name in ("dense", "loop")
    }
    kind = str(dtype).removeprefix("torch.")
    return (
        f"| {kind}, {num_experts} experts of {width} x {inner}, top-{top_k} | {median['dense'] * 1e3:.1f} | {median['ours'] * 1e3:.1f} | "
        f"{median['loop'] * 1e3:.1f} | {ratio['dense']:.2f} | {ratio['loop']:.2f} |"
    )


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bf16", action="store_true", help="bf16 too: minutes on CPUs without bf16 units")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if torch.backends.cpu.get_cpu_capability() == "AVX2" and "avx2" in native.isas():
        native.use_isa("avx2")  # where torch is held to it (ATEN_CPU_CAPABILITY), so are our loops
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, commit {commit}, one thread, {args.tokens} tokens\n")  # fmt: skip
    print("| | dense ms | ours ms | loop ms | dense / ours | loop / ours |\n|---|--:|--:|--:|--:|--:|")
    for num_experts, inner, top_k in ((8, 1024, 2), (64, 256, 2), (64, 256, 8)):
        for dtype in (torch.float32, *((torch.bfloat16,) if args.bf16 else ())):
            print(compare(num_experts, top_k, args.tokens, args.width, inner, dtype, args.rounds), flush=True)


if __name__ == "__main__":
    main()
