"""What a hop carries, described in few bytes: dtypes, shapes and which values have gradients. Pure.

Sent by `mail` ahead of values whose form the receiver has not seen. A hidden state of three dimensions takes 16 bytes, with a
boolean mask of four 34.

    byte 0      1 for a tuple (or list), 0 for a bare tensor
    per value   dtype (255: None; +128: has a gradient), number of dimensions, four bytes each
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepspeed.utils.errors import DeepSpeedError

DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
)  # fmt: skip
_NONE, _GRADIENT = 127, 128


class Value(NamedTuple):
    """One value of a hop; `dtype` None: the value is None."""

    dtype: torch.dtype | None
    shape: tuple[int, ...] = ()
    has_gradient: bool = False

    @property
    def nbytes(self) -> int:
        """Of the value itself."""
        return 0 if self.dtype is None else math.prod(self.shape) * self.dtype.itemsize


class Form(NamedTuple):
    """All values of a hop, and whether they are handed on as a tuple."""

    values: tuple[Value, ...]
    is_tuple: bool

    def encode(self) -> bytes:
        """See the module's text."""
        parts = [bytes([self.is_tuple])]
        for value in self.values:
            code = _NONE if value.dtype is None else DTYPES.index(value.dtype)
            parts.append(bytes([code + _GRADIENT * value.has_gradient, len(value.shape)]))
            parts.append(struct.pack(f"<{len(value.shape)}I", *value.shape))
        return b"".join(parts)

    @property
    def nbytes(self) -> int:
        """Of the values themselves."""
        return sum(value.nbytes for value in self.values)


def decode(data: bytes) -> Form:
    """The inverse of `Form.encode`."""
    values, at = [], 1
    while at < len(data):
        code, num_dims = data[at], data[at + 1]
        shape = struct.unpack_from(f"<{num_dims}I", data, at + 2)
        has_gradient, code = code >= _GRADIENT, code % _GRADIENT
        values.append(Value(None if code == _NONE else DTYPES[code], tuple(shape), has_gradient))
        at += 2 + 4 * num_dims
    return Form(tuple(values), bool(data[0]))


def unpack(output: Any, where: str) -> tuple[list[Tensor | None], bool]:
    """The values that a stage returned, and whether as a tuple. Raises DeepSpeedError for anything but tensors and None."""
    is_tuple = isinstance(output, (tuple, list))
    values = list(output) if is_tuple else [output]
    for i, value in enumerate(values):
        if value is not None and not isinstance(value, Tensor):
            raise DeepSpeedError(
                f"{where} returns a {type(value).__name__} as value {i}: stages hand on tensors, None and tuples of them.\n"
                "  Make it a tensor, or an argument of the next layer's constructor."
            )
        if isinstance(value, Tensor) and (value.dtype not in DTYPES or value.layout is not torch.strided):
            raise DeepSpeedError(
                f"{where} returns value {i} as {value.dtype}, {value.layout}: stages hand on dense tensors."
            )
    return values, is_tuple


def form_of(values: Sequence[Tensor | None], is_tuple: bool) -> Form:
    """The form of what is sent on; whether a value has a gradient is its `requires_grad`."""
    described = [Value(None) if v is None else Value(v.dtype, tuple(v.shape), v.requires_grad) for v in values]
    return Form(tuple(described), is_tuple)
