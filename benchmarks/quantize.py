"""Quantisation and signs on one core: the compiled loops beside torch's operations, in one run.

    python benchmarks/quantize.py [--numel 4194304] [--rounds 5]

Prints gigabytes of floating-point input (or output) a second of the thread's own time, the best of the rounds, and the machine's own
copy beside.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import torch

from deepspeed.kernels import native, native_quantize
from deepspeed.kernels.reference import quantize, signs


def best(call: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest call."""
    call()
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return min(times)


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numel", type=int, default=4 * 2**20)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, {native.isas()[:1]}, torch {torch.__version__}, one thread\n")
    print("| operation | GB/s compiled | GB/s torch | ratio |\n|---|---|---|---|")
    x = torch.randn(args.numel)
    copy = torch.empty_like(x)
    print(f"| copy_ | | {x.nbytes / best(lambda: copy.copy_(x), args.rounds) / 1e9:.2f} | |")
    for dtype in (torch.float32, torch.bfloat16):
        for num_bits, symmetric in ((8, True), (8, False), (4, True), (4, False)):
            form(x.to(dtype), num_bits, symmetric, args.rounds)
    error = torch.zeros_like(x)
    row("compress_signs", x.nbytes, args.rounds, lambda: native_quantize.compress_signs(x, error),
        lambda: signs.compress_signs(x, error))  # fmt: skip
    bits, scale = signs.compress_signs(x, error)
    row("add_signs", x.nbytes, args.rounds, lambda: native_quantize.add_signs(bits, error, scale),
        lambda: signs.add_signs(bits, error, scale))  # fmt: skip


def form(x: torch.Tensor, num_bits: int, symmetric: bool, rounds: int) -> None:
    """Both ways of one format."""
    name = f"int{num_bits}{'' if symmetric else ', asymmetric'}"
    dtype = str(x.dtype).removeprefix("torch.")
    packed = quantize.quantize(x, 128, num_bits, symmetric=symmetric)
    row(f"quantize {dtype} to {name}", x.nbytes, rounds,
        lambda: native_quantize.quantize(x, 128, num_bits, symmetric=symmetric),
        lambda: quantize.quantize(x, 128, num_bits, symmetric=symmetric))  # fmt: skip
    row(f"dequantize {name} to {dtype}", x.nbytes, rounds,
        lambda: native_quantize.dequantize(packed, num_bits, x.dtype),
        lambda: quantize.dequantize(packed, num_bits, x.dtype))  # fmt: skip


def row(name: str, nbytes: int, rounds: int, ours: Callable[[], object], theirs: Callable[[], object]) -> None:
    """One line of the table."""
    fast, slow = (nbytes / best(call, rounds) / 1e9 for call in (ours, theirs))
    print(f"| {name} | {fast:.2f} | {slow:.2f} | {fast / slow:.1f} |")


if __name__ == "__main__":
    main()
