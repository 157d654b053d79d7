"""Bytes that rest as int8 with a scale for every group of elements: half of bf16, a quarter of fp32.

Used by `zero.build` for parameters that do not train (`zero_quantized_nontrainable_weights`); a bucket loads them into its full
buffer as it would from a disk.

Invariant: what is loaded is within half a group's scale of what was stored; storing what was loaded changes nothing but
by a rounding of the element's dtype.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from deepspeed.kernels.reference.quantize import Quantized
from deepspeed.kernels.table import pick
from deepspeed.tiers.rest import Copied, Transfer

GROUP_NUMEL = 256
"""Elements with one scale: 8.125 bits an element."""


@final
class Int8Rest:
    """A flat tensor [numel] of `dtype`, kept in int8 on `device`. Begins as zeros."""

    tensor: Tensor | None = None
    device: torch.device | None = None

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        self.numel, self.dtype = numel, dtype
        num_groups = -(-numel // GROUP_NUMEL)
        self._values = torch.zeros(num_groups, GROUP_NUMEL, dtype=torch.int8, device=device)
        self._scales = torch.zeros(num_groups, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes that they take."""
        return self._values.nbytes + self._scales.nbytes

    def view(self, start: int, stop: int) -> Tensor | None:
        """See Rest. They have to be loaded."""
        return None

    def start_load(self, start: int, into: Tensor) -> Transfer:
        """See Rest."""
        first, groups = self._groups(start, into.numel())
        into.copy_(groups[start - first : start - first + into.numel()])
        return Copied()

    def start_store(self, start: int, source: Tensor) -> Transfer:
        """See Rest. Groups that are covered in part are quantised anew."""
        first, groups = self._groups(start, source.numel())
        groups[start - first : start - first + source.numel()].copy_(source)
        at = first // GROUP_NUMEL
        quantized: Quantized = pick("quantize", groups.device.type)(groups, GROUP_NUMEL)
        self._values[at : at + len(quantized.scales)].copy_(quantized.values)
        self._scales[at : at + len(quantized.scales)].copy_(quantized.scales)
        return Copied()

    def release(self) -> None:
        """See Rest."""
        self._values, self._scales = self._values[:0].clone(), self._scales[:0].clone()

    def _groups(self, start: int, numel: int) -> tuple[int, Tensor]:
        """(position of the first, fp32 values) of the groups that have these elements."""
        low, high = start // GROUP_NUMEL, -(-(start + numel) // GROUP_NUMEL)
        found = Quantized(self._values[low:high], self._scales[low:high])
        values: Tensor = pick("dequantize", self._values.device.type)(found, 8, torch.float32)
        return low * GROUP_NUMEL, values
