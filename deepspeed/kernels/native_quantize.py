"""The compiled loops of quantisation and of signs: the signatures and the bits of `reference`, several times as fast.

Picked by `table` for tensors in main memory; what the loops do not take (other dtypes, memory with gaps, a package built
without a compiler) goes to the reference.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from deepspeed.kernels import native
from deepspeed.kernels.native_optimizers import DTYPES
from deepspeed.kernels.reference import quantize as reference
from deepspeed.kernels.reference import signs as reference_signs
from deepspeed.kernels.reference.quantize import Quantized, check_groups

_PIECE_NUMEL = 1 << 15


def quantize(
    x: Tensor, group_size: int, num_bits: int = 8, *, symmetric: bool = True, out: Quantized | None = None
) -> Quantized:
    """`reference.quantize.quantize`; `out`: contiguous memory for the result."""
    check_groups(x.numel(), group_size, num_bits)
    library = _library()
    if library is None or x.dtype not in DTYPES or not x.numel():
        if out is None:
            return reference.quantize(x, group_size, num_bits, symmetric=symmetric)
        return _by_reference(x.reshape(-1), group_size, num_bits, out)
    x = x.detach().contiguous()
    if out is None:
        out = empty_groups(x.numel() // group_size, group_size, num_bits, symmetric)
    _call(library.ds_quantize, x, group_size, num_bits, out)
    return out


def empty_groups(num_groups: int, group_size: int, num_bits: int, symmetric: bool) -> Quantized:
    """Memory in which so many groups are quantized."""
    kind = torch.int8 if symmetric and num_bits == 8 else torch.uint8
    values = torch.empty(num_groups, group_size * num_bits // 8, dtype=kind)
    return Quantized(values, torch.empty(num_groups), None if symmetric else torch.empty(num_groups))


def _by_reference(x: Tensor, group_size: int, num_bits: int, out: Quantized) -> Quantized:
    """Piece by piece, because torch's kernels make several tensors in fp32 of each."""
    at = 0
    for piece in x.split(max(_PIECE_NUMEL // group_size, 1) * group_size):
        found = reference.quantize(piece, group_size, num_bits, symmetric=out.minima is None)
        for part, into in zip(found, out, strict=True):
            if part is not None and into is not None:
                into[at : at + len(part)] = part
        at += len(found.scales)
    return out


def dequantize(quantized: Quantized, num_bits: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    """`reference.quantize.dequantize`."""
    library = _library()
    values = quantized.values
    if library is None or dtype not in DTYPES or not all(t is None or t.is_contiguous() for t in quantized):
        return reference.dequantize(quantized, num_bits, dtype)
    group_size = values.shape[1] * 8 // num_bits
    out = torch.empty(len(values) * group_size, dtype=dtype)
    if out.numel():
        _call(library.ds_dequantize, out, group_size, num_bits, quantized)
    return out


def compress_signs(x: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.signs.compress_signs`."""
    library = _library()
    is_taken = all(t.dtype is torch.float32 and t.is_contiguous() for t in (x, error))
    if library is None or not is_taken or not x.numel():
        return reference_signs.compress_signs(x, error)
    reference_signs.check_signs(x.numel())
    bits = torch.empty(x.numel() // 8, dtype=torch.uint8)
    library.ds_compress_signs.restype = ctypes.c_float
    scale = library.ds_compress_signs(
        *map(_address, (x, error, bits)), ctypes.c_int64(x.numel()), torch.get_num_threads()
    )
    return bits, torch.tensor(scale)


def add_signs(bits: Tensor, into: Tensor, scale: Tensor | float) -> None:
    """`reference.signs.add_signs`."""
    library = _library()
    if library is None or into.dtype is not torch.float32 or not into.is_contiguous() or not bits.is_contiguous():
        reference_signs.add_signs(bits, into, scale)
        return
    library.ds_add_signs(
        *map(_address, (bits, into)), ctypes.c_int64(into.numel()), ctypes.c_float(float(scale)), torch.get_num_threads()
    )  # fmt: skip


def _library() -> ctypes.CDLL | None:
    library = native.library()
    if library is None:
        native.warn_slower("quantisation runs on torch's kernels, with more passes over memory")
    return library


def _call(function: Callable[..., None], floats: Tensor, group_size: int, num_bits: int, quantized: Quantized) -> None:
    values, scales, minima = quantized
    function(
        _address(floats),
        DTYPES[floats.dtype],
        ctypes.c_int64(floats.numel()),
        ctypes.c_int64(group_size),
        num_bits,
        int(minima is None),
        _address(values),
        _address(scales),
        _address(scales if minima is None else minima),
        torch.get_num_threads(),
    )


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
