"""Products of one row with a weight, and attention of one token over a cache, as shares of this machine's read bandwidth.

    python benchmarks/products.py [--mib 192] [--rounds 5] [--places 5] [--isa avx2] [--products]

One thread, in its own processor time, so that other work on the machine takes little away. What a case reads is allocated anew in
several places, because pages and memory channels differ: in each place the case and the fastest plain read of that same memory
(`native_products.read_seconds`) take turns, and their best rounds give a share: bytes of weight (scales too) or cache per second
over bytes read per second. A row of the table has the medians over the places, and the least and the largest share. Weights and
caches lie in pages of 2 MiB where Linux gives them, the faster way, in which an engine has its weights after its first `generate`.
Beside them torch, in the first place: its product in that dtype, or of the dequantized weight; its `scaled_dot_product_attention`.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspeed.kernels import native, native_products
from deepspeed.kernels.native_attention import decode_attention
from deepspeed.kernels.native_quantize import dequantize, quantize
from deepspeed.kernels.pages import empty_rows, gather_in_large_pages, in_large_pages

WIDTH = 2048
DIM = 128


def laid(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in large pages from the first write on, and what is left without one gathered."""
    return _copied(tensor, torch.empty_like(tensor))


def laid_rows(tensor: torch.Tensor) -> torch.Tensor:
    """As `laid`, where an engine's cache would begin."""
    return _copied(tensor, empty_rows(tensor.shape, tensor, tensor.dtype))


def _copied(tensor: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    copy = in_large_pages(to).copy_(tensor)
    gather_in_large_pages([copy])
    return copy


class Case:
    """Something that reads `memory`, and what torch does instead."""

    def __init__(
        self, name: str, memory: list[Tensor], ours: Callable[[], object], torchs: Callable[[], object] | None
    ) -> None:
        self.name, self.memory, self.ours, self.torchs = name, memory, ours, torchs
        self.nbytes = sum(tensor.nbytes for tensor in memory)

    def read_seconds(self) -> float:
        """Of one plain read of all of it."""
        return sum(native_products.read_seconds(tensor.view(-1).view(torch.int64)) for tensor in self.memory)


def seconds(call: Callable[[], object]) -> float:
    """Of this thread's processor."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


def measure(make: Callable[[], Case], rounds: int, places: int) -> str:
    """A row of the table."""
    speeds, reads, padding = [], [], []
    for place in range(places):
        case = make()
        ours, reading = float("inf"), float("inf")
        for _ in range(rounds):
            ours, reading = min(ours, seconds(case.ours)), min(reading, case.read_seconds())
        speeds.append(case.nbytes / ours)
        reads.append(case.nbytes / reading)
        if place == 0:
            theirs = case.nbytes / min(seconds(case.torchs) for _ in range(2)) if case.torchs else 0.0
        name = case.name
        del case
        padding.append(torch.zeros((5 << 20) * (place + 1), dtype=torch.uint8))  # the next one lies elsewhere
    shares = [speed / read for speed, read in zip(speeds, reads, strict=True)]
    ours, read = statistics.median(speeds), statistics.median(reads)
    return (
        f"| {name} | {ours / 1e9:.1f} | {read / 1e9:.1f} | {statistics.median(shares):.0%} "
        f"({min(shares):.0%} to {max(shares):.0%}) | {theirs / 1e9:.2f} | {theirs / reads[0]:.0%} |"
    )


def product(bits: int, nbytes: int) -> Case:
    """A weight of that many bytes, but for scales."""
    num_rows = nbytes * 8 // bits // WIDTH
    x = torch.randn(1, WIDTH)
    if bits >= 16:
        weight = laid(torch.empty(num_rows, WIDTH, dtype=torch.float32 if bits == 32 else torch.bfloat16).normal_())
        return Case(f"product, {'fp32' if bits == 32 else 'bf16'}", [weight], lambda: native_products.product(x, weight, None),
                    lambda: F.linear(x.to(weight.dtype), weight))  # fmt: skip
    packed = quantize(torch.empty(num_rows, WIDTH).normal_(), 64, bits)
    packed = packed._replace(values=laid(packed.values), scales=laid(packed.scales))
    return Case(f"product, int{bits}", [packed.values, packed.scales], lambda: native_products.quantized_product(x, packed, bits, num_rows, None),
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
        arguments = {one: laid_rows(tensor) for one, tensor in arguments.items()}

        def torchs() -> object:
            keys, values = (dequantize(one).view(shape) for one in (k, v))
            return F.scaled_dot_product_attention(query.unsqueeze(2), keys, values, enable_gqa=True)

        return Case(
            name, list(arguments.values()), lambda: decode_attention(query, scale=DIM**-0.5, **arguments), torchs
        )
    keys, values = (laid_rows(one.to(dtype)) for one in cache)
    low = query.to(dtype)
    return Case(name, [keys, values], lambda: decode_attention(low, keys, values, scale=DIM**-0.5),
                lambda: F.scaled_dot_product_attention(low.unsqueeze(2), keys, values, enable_gqa=True))  # fmt: skip


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=192, help="of each weight and cache; more than the caches have")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--places", type=int, default=5, help="allocations of each case")
    parser.add_argument("--isa", choices=native.isas(), default=None, help="instead of the best one here")
    parser.add_argument("--products", action="store_true", help="without attention")
    args = parser.parse_args()
    native.use_isa(args.isa)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=root
    )
    print(
        f"{platform.machine()}, {args.isa or native.isas()[:1]}, torch {torch.__version__}, commit {commit.stdout.strip()}, load {os.getloadavg()[0]:.1f}"
    )
    makers: list[Callable[[], Case]] = [lambda bits=bits: product(bits, args.mib << 20) for bits in (32, 16, 8, 4)]  # type: ignore[misc]
    for dtype in () if args.products else (torch.bfloat16, torch.int8):
        makers += [lambda dtype=dtype, heads=heads: attention(dtype, heads, args.mib << 20) for heads in (1, 4, 8)]  # type: ignore[misc]
    print(f"{args.mib} MiB each, {args.places} places, {args.rounds} rounds\n")
    print(
        "| | GB/s | read of it: GB/s | share, median (least to most) | torch: GB/s | share |\n|---|--:|--:|--:|--:|--:|"
    )
    for make in makers:
        print(measure(make, args.rounds, args.places), flush=True)


if __name__ == "__main__":
    main()
