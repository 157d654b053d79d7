"""Products of few rows with a weight, compiled: y = x W^T + b from fp32, bf16, int8 or int4, at the speed of reading W.

Asked by `quant.linear` for what a model does for one token after the other; `takes` says what the loops take, and who asks does the
rest with torch. Beside integers, x is rounded to 15 bits with a scale per group, far finer than the weights are.
"""

from __future__ import annotations

import ctypes
import time

import torch
from torch import Tensor

from deepspeed.kernels import native
from deepspeed.kernels.reference.quantize import Quantized

MAX_ROWS = 32
"""Rows of x up to which these loops are faster than torch's blocked products, for which integers have to be made whole (benchmarks/README.md)."""
MAX_GROUP = 4096
"""Elements that may share a scale; the loops take up to 512 of them at a time, whose products fit in 32 bits."""

_BITS = {torch.float32: 32, torch.bfloat16: 16}


def takes(group_size: int) -> bool:
    """Whether the loops multiply with symmetric weights in groups of this size, and are there."""
    if group_size % 32 or group_size > MAX_GROUP:
        return False
    if native.library() is None:
        native.warn_slower("products with quantized weights run on torch's kernels, which first make them whole")
        return False
    return True


def quantized_product(x: Tensor, weight: Quantized, num_bits: int, num_rows: int, bias: Tensor | None) -> Tensor:
    """x [..., width] with a weight [num_rows, width] of symmetric groups; fp32 [..., num_rows]. `takes` must hold."""
    width = x.shape[-1]
    group_size = weight.values.shape[1] * 8 // num_bits
    return _call(x, weight.values, num_bits, weight.scales, group_size, num_rows, width, bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., width] with a contiguous weight [num_rows, width] in fp32 or bf16; fp32 [..., num_rows]."""
    return _call(x, weight, _BITS[weight.dtype], None, 1, weight.shape[0], weight.shape[1], bias)


def read_bandwidth(nbytes: int = 1 << 28, rounds: int = 5) -> float:
    """Bytes per second at which one core reads memory beyond the caches: in one place, or in 2, 4 or 8 side by side, whichever is
    fastest here; the best of some rounds."""
    words = torch.ones(nbytes // 8, dtype=torch.int64)
    return nbytes / min(read_seconds(words) for _ in range(rounds))


def read_seconds(words: Tensor) -> float:
    """Seconds of this thread to read a tensor of int64 once, by the fastest way."""
    library = native.library()
    found = []
    for streams in (1, 2, 4, 8):
        start = time.thread_time()
        if library is None:
            words.sum()
        else:
            library.ds_read(ctypes.c_void_p(words.data_ptr()), ctypes.c_int64(words.numel()), streams)
        found.append(time.thread_time() - start)
    return min(found)


def _call(
    x: Tensor,
    weight: Tensor,
    bits: int,
    scales: Tensor | None,
    group_size: int,
    num_rows: int,
    width: int,
    bias: Tensor | None,
) -> Tensor:
    library = native.library()
    assert library is not None, "takes() says whether there is a library"
    x = x.detach().to(torch.float32).contiguous()
    bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
    y = torch.empty(*x.shape[:-1], num_rows)
    library.ds_product(
        _address(weight),
        bits,
        _address(scales),
        ctypes.c_int64(group_size),
        _address(x),
        _address(bias),
        _address(y),
        ctypes.c_int64(num_rows),
        ctypes.c_int64(width),
        ctypes.c_int64(x.numel() // width),
        torch.get_num_threads(),
    )
    return y


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
