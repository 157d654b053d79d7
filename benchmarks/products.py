"""Products of one row with a weight, and attention of one token over a cache, as shares of this machine's read bandwidth.

    python benchmarks/products.py [--mib 192] [--rounds 7]

One thread; every measurement in every round, the best of the rounds, in the thread's own processor time, so that other work on
the machine takes little away. A share is bytes of weight (scales too) or cache per second over the fastest read of plain memory
in the case's own rounds (`native_products.read_seconds`). Weights, caches and the memory that is read beside them lie in pages of
2 MiB where Linux gives them, the faster way, in which an engine has its weights after its first `generate`. Beside them torch: its product
in that dtype, or of the dequantized weight; its `scaled_dot_product_attention`.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from deepspeed.kernels import native, native_products
from deepspeed.kernels.native_attention import decode_attention
from deepspeed.kernels.native_quantize import dequantize, quantize
from deepspeed.kernels.pages import gather_in_large_pages, in_large_pages

WIDTH = 2048
DIM = 128


def laid(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in large pages from the first write on, and what is left without one gathered."""
    copy = in_large_pages(torch.empty_like(tensor)).copy_(tensor)
    gather_in_large_pages([copy])
    return copy


class Case:
    """Something that reads `nbytes`, and what torch does instead."""

    def __init__(self, name: str, nbytes: int, ours: Callable[[], object], torchs: Callable[[], object] | None) -> None:
        self.name, self.nbytes = name, nbytes
        self.calls = [ours, torchs] if torchs else [ours]
        self.best = [float("inf")] * len(self.calls)

    def measure(self, rounds: int) -> None:
        """Each call once, torch's in the first rounds alone: it is slow."""
        for i, call in enumerate(self.calls if rounds < 3 else self.calls[:1]):
            start = time.thread_time()
            call()
            self.best[i] = min(self.best[i], time.thread_time() - start)


def product(bits: int, nbytes: int) -> Case:
    """A weight of that many bytes, but for scales."""
    num_rows = nbytes * 8 // bits // WIDTH
    x = torch.randn(1, WIDTH)
    if bits >= 16:
        weight = laid(torch.empty(num_rows, WIDTH, dtype=torch.float32 if bits == 32 else torch.bfloat16).normal_())
        return Case(f"product, {'fp32' if bits == 32 else 'bf16'}", weight.nbytes, lambda: native_products.product(x, weight, None),
                    lambda: F.linear(x.to(weight.dtype), weight))  # fmt: skip
    packed = quantize(torch.empty(num_rows, WIDTH).normal_(), 64, bits)
    packed = packed._replace(values=laid(packed.values), scales=laid(packed.scales))
    total = packed.values.nbytes + packed.scales.nbytes
    return Case(f"product, int{bits}", total, lambda: native_products.quantized_product(x, packed, bits, num_rows, None),
                lambda: F.linear(x, dequantize(packed, bits).view(num_rows, WIDTH)))  # fmt: skip


def attention(dtype: torch.dtype, heads: int, nbytes: int) -> Case:
    """A cache of that many bytes of keys and of values together, 4 heads shared by `heads` each."""
    shared = 4
    positions = nbytes // 2 // dtype.itemsize // DIM // shared
    cache = [torch.empty(1, shared, positions, DIM).normal_() for _ in range(2)]
    query = torch.randn(1, shared * heads, DIM)
    name = f"attention, {str(dtype).removeprefix('torch.')}, {heads} heads share one"
    if dtype is torch.int8:
        k, v = (quantize(one, DIM) for one in cache)
        shape = cache[0].shape
        arguments = {"keys": k.values.view(shape), "values": v.values.view(shape),
                     "key_scales": k.scales.view(shape[:3]), "value_scales": v.scales.view(shape[:3])}  # fmt: skip
        arguments = {one: laid(tensor) for one, tensor in arguments.items()}
        total = sum(t.nbytes for t in arguments.values())

        def torchs() -> object:
            keys, values = (dequantize(one).view(shape) for one in (k, v))
            return F.scaled_dot_product_attention(query.unsqueeze(2), keys, values, enable_gqa=True)

        return Case(name, total, lambda: decode_attention(query, scale=DIM**-0.5, **arguments), torchs)
    keys, values = (laid(one.to(dtype)) for one in cache)
    low = query.to(dtype)
    return Case(name, keys.nbytes + values.nbytes, lambda: decode_attention(low, keys, values, scale=DIM**-0.5),
                lambda: F.scaled_dot_product_attention(low.unsqueeze(2), keys, values, enable_gqa=True))  # fmt: skip


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=192, help="of each weight and cache; more than the caches have")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=root
    )
    print(
        f"{platform.machine()}, {native.isas()[:1]}, torch {torch.__version__}, commit {commit.stdout.strip()}, load {os.getloadavg()[0]:.1f}"
    )
    makers: list[Callable[[], Case]] = [lambda bits=bits: product(bits, args.mib << 20) for bits in (32, 16, 8, 4)]  # type: ignore[misc]
    for dtype in (torch.bfloat16, torch.int8):
        makers += [lambda dtype=dtype, heads=heads: attention(dtype, heads, args.mib << 20) for heads in (1, 4, 8)]  # type: ignore[misc]
    words = laid(torch.ones(args.mib << 17, dtype=torch.int64))
    print(f"{args.mib} MiB each, {args.rounds} rounds\n")
    print("| | GB/s | read beside it: GB/s | share | torch: GB/s | share |\n|---|--:|--:|--:|--:|--:|")
    for make in makers:
        case, fastest = make(), 0.0
        for i in range(args.rounds):
            case.measure(i)
            fastest = max(fastest, words.nbytes / native_products.read_seconds(words))
        ours, theirs = (case.nbytes / seconds for seconds in case.best)
        print(
            f"| {case.name} | {ours / 1e9:.2f} | {fastest / 1e9:.2f} | {ours / fastest:.0%} | {theirs / 1e9:.2f} | {theirs / fastest:.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
