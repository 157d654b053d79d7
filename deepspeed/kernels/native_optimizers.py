"""The compiled loops of csrc/, on lists of tensors: one pass over memory per step, on torch's number of threads.

Called by `kernels`, which keeps a torch implementation of each function for what these do not take: tensors elsewhere
than in main memory, dtypes beyond fp32, bf16 and fp16, memory with gaps, or a package built without a compiler.

    per run      parameter, gradient, up to two states, low-precision copy: addresses, gathered anew at every call
    per call     one table for each mix of dtypes; the loops widen to fp32, compute, and round once to nearest even

Invariant: a call that returns False has changed nothing. An element's result does not depend on the thread, the
instruction set, its neighbours, or where a tensor was cut.
"""

from __future__ import annotations

import ctypes
import enum
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deepspeed.kernels import native

Lows = Sequence[Tensor | None]

_NUM_SCALARS = 10
DTYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
"""What the loops read and write, numbered as in csrc/kernels.h."""
_SHIFTS = (0, 4, 8, 8, 12)
"""Of each column's dtype in the code that csrc/optimizers.cpp reads."""


class Operation(enum.IntEnum):
    """The loops, numbered as in csrc/optimizers.cpp."""

    ADAM = 0
    LION = 1
    ADAGRAD = 2
    SGD = 3
    LAMB_MOMENTS = 4
    LAMB_APPLY = 5


class Decay(enum.IntEnum):
    """How weight decay enters, numbered as in csrc/kernels.h."""

    NONE = 0
    DECOUPLED = 1
    L2 = 2

    @classmethod
    def of(cls, weight_decay: float, decoupled: bool) -> Decay:
        """The form of a setting."""
        return cls.NONE if not weight_decay else cls.DECOUPLED if decoupled else cls.L2


class Columns(NamedTuple):
    """What a loop works on, position by position; None where it has no such tensors."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor] | None = None
    first: Sequence[Tensor] | None = None
    second: Sequence[Tensor] | None = None
    lows: Lows | None = None


def step_(
    operation: Operation,
    variant: int,
    columns: Columns,
    scalars: Sequence[Sequence[float]],
    squares: Tensor | None = None,
) -> bool:
    """Run a loop over all runs, in place; False, with nothing changed, where it does not take them.

    `scalars[i]` is what the loop reads for run i; LAMB_MOMENTS writes the sums of squares of parameters and updates to
    `squares` [num_runs, 2] in float64.
    """
    tables: dict[int, tuple[list[int], array[int], array[float]]] = {}
    for i in range(len(columns.params)):
        addresses, code = _describe([column[i] if column is not None else None for column in columns])
        if code is None:
            return False
        table = tables.get(code)
        if table is None:
            table = tables[code] = ([], array("q"), array("f"))
        table[0].append(i)
        table[1].extend(addresses)
        table[2].extend(scalars[i])
        table[2].extend([0.0] * (_NUM_SCALARS - len(scalars[i])))
    library = native.library()
    if library is None:
        native.warn_slower("CPU optimizers step on torch's kernels, with more passes over memory")
        return False
    for code, (positions, addresses_of, scalars_of) in tables.items():
        sums = torch.empty(len(positions), 2, dtype=torch.float64)
        library.ds_optimizer_step(
            int(operation),
            int(variant),
            ctypes.c_void_p(addresses_of.buffer_info()[0]),
            ctypes.c_void_p(scalars_of.buffer_info()[0]),
            ctypes.c_int64(len(positions)),
            ctypes.c_int64(code),
            torch.get_num_threads(),
            ctypes.c_void_p(sums.data_ptr()),
        )
        if squares is not None:
            squares[positions] = sums
    return True


def _describe(tensors: list[Tensor | None]) -> tuple[list[int], int | None]:
    """A row of the table, and the dtypes as one code; no code where the loops do not take these tensors.

    All must have the first one's elements in the first one's memory order, without gaps.
    """
    param = tensors[0]
    assert param is not None, "every run has a parameter"
    numel = param.numel()
    order = None if param.is_contiguous() else param.stride() if _has_no_gaps(param) else ()
    code = 0
    row: list[int] = []
    for shift, tensor in zip(_SHIFTS, tensors, strict=True):
        if tensor is None:
            row.append(0)
            continue
        dtype = DTYPES.get(tensor.dtype)
        is_taken = tensor.is_contiguous() if order is None else tensor.stride() == order
        if dtype is None or not is_taken or tensor.numel() != numel or tensor.device.type != "cpu":
            return row, None
        if code >> shift & 15 not in (0, dtype):  # two states of different dtypes
            return row, None
        code |= dtype << shift
        row.append(tensor.data_ptr())
    row.append(numel)
    return row, code if code >> 12 != DTYPES[torch.float32] else None


def _has_no_gaps(tensor: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
