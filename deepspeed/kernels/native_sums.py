"""Sums of ranks' messages, compiled: one pass over memory for what `reference.sums` does in two or more, with its bits.

Picked by `table` for tensors in main memory; what the loops do not take (fp64, integers, a package built without a compiler)
goes to the reference. `comm.shared` hands over addresses in memory that ranks share.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from deepspeed.kernels import native
from deepspeed.kernels.native_optimizers import DTYPES
from deepspeed.kernels.reference import sums as reference


def add_up(parts: Sequence[Tensor], out: Tensor, divide_by: float, accumulate: bool) -> None:
    """`reference.sums.add_up`."""
    dtype = parts[0].dtype
    if _library() is None or dtype not in DTYPES or out.dtype not in DTYPES or not out.is_contiguous():
        reference.add_up(parts, out, divide_by, accumulate)
    else:
        add_up_at([part.data_ptr() for part in parts], dtype, out, divide_by, accumulate)


def add_up_at(
    addresses: Sequence[int], dtype: torch.dtype, out: Tensor, divide_by: float, accumulate: bool = False
) -> None:
    """The same for parts that lie at these addresses, without gaps. Both dtypes are in DTYPES, and there is a library."""
    num_parts = len(addresses)
    library = _library()
    assert library is not None, "asked for after it was found"
    library.ds_add_up(
        (ctypes.c_void_p * num_parts)(*addresses),
        num_parts,
        DTYPES[dtype],
        out.data_ptr(),
        DTYPES[out.dtype],
        out.numel(),
        divide_by,
        accumulate,
        torch.get_num_threads(),
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = native.library()
    if library is None:
        native.warn_slower("sums over ranks run on torch's kernels, with more passes over memory")
        return None
    library.ds_add_up.argtypes = (
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_int64,
        ctypes.c_float,
        ctypes.c_int,
        ctypes.c_int,
    )
    library.ds_add_up.restype = None
    return library
