"""What the device can do: operations per second of large matrix products in one dtype, measured.

The denominator of the utilisation (MFU) in the progress line and in profiles. Vendors' figures are for clocks and sizes
that a given card may never see, and CPUs have none; a square product in the same dtype, with the same threads, is what
this process could reach.
"""

from __future__ import annotations

import functools
import time

import torch

from deepspeed.accelerator import get_accelerator

MIN_RUN_S = 0.02
"""A product that takes so long is large enough: launching it is less than a percent, and all cores have work."""
NUM_RUNS = 3
MAX_SIDE = 8192


@functools.lru_cache(maxsize=None)
def peak_flops(dtype: torch.dtype, threads: int) -> float:
    """Operations per second; measured at the first call for a dtype and a number of threads (about 0.2 s)."""
    device = torch.device(get_accelerator().current_device_name())
    side, best = 256, 0.0
    while True:
        seconds = _product_s(side, dtype, device)
        best = max(best, 2 * side**3 / seconds)
        if seconds >= MIN_RUN_S or side >= MAX_SIDE:
            return best
        side *= 2


def measured_peak(dtype: torch.dtype) -> float:
    """`peak_flops` with the threads torch uses now. In bf16 or fp16 on a CPU without such units, that of fp32."""
    narrow_cpu = get_accelerator().device_name() == "cpu" and dtype in (torch.bfloat16, torch.float16)
    fp32 = peak_flops(torch.float32, torch.get_num_threads()) if narrow_cpu else 0.0
    return max(fp32, 0.0 if narrow_cpu and _is_slow(dtype, fp32) else peak_flops(dtype, torch.get_num_threads()))


def _is_slow(dtype: torch.dtype, fp32: float) -> bool:
    """Whether a small product shows that this CPU multiplies `dtype` in scalar code, so that a large one would take ages."""
    return 2 * 128**3 / _product_s(128, dtype, torch.device("cpu")) < fp32 / 2


def _product_s(side: int, dtype: torch.dtype, device: torch.device) -> float:
    a = torch.ones(side, side, dtype=dtype, device=device)
    synchronize = get_accelerator().synchronize
    fastest = float("inf")
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for _ in range(NUM_RUNS):
            synchronize()
            start_s = time.perf_counter()
            torch.mm(a, a)
            synchronize()
            fastest = min(fastest, time.perf_counter() - start_s)
    return fastest
