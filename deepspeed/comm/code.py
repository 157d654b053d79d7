"""A tensor as one message of uint8: integers of few bits, and a scale for each group of them.

Written and read by the quantized exchanges (`comm.quantized_exchanges`) and what they keep (`comm.feedback`); the arithmetic is `kernels`'.

    | scale of group 0, 1, ...  fp32 | integers of group 0, 1, ... |      the last group may be smaller

Invariant: what is not finite makes its group's scale so, and its whole group comes back as nan.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deepspeed.kernels.reference.quantize import Quantized
from deepspeed.kernels.table import pick

SCALE_NBYTES = 4


@dataclass(frozen=True)
class Code:
    """Symmetric integers of `num_bits` with an fp32 scale for each `group_size` elements, the last group smaller."""

    num_bits: int
    group_size: int

    def nbytes(self, numel: int) -> int:
        """Of the message of so many elements."""
        return SCALE_NBYTES * -(-numel // self.group_size) + -(-numel * self.num_bits // 8)

    def encode(self, x: Tensor) -> Tensor:
        """[numel] of any float dtype, 1-D, as one message of uint8."""
        parts = [_quantize(piece, size, self.num_bits) for piece, size in self._pieces(x)]
        scales = [part.scales.view(torch.uint8) for part in parts]
        return torch.cat([*scales, *(part.values.view(-1).view(torch.uint8) for part in parts)])

    def decode(self, message: Tensor, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The elements again, [numel]."""
        at_scale, at = 0, SCALE_NBYTES * -(-numel // self.group_size)
        found = []
        for start, size in self._cuts(numel):
            num_groups, nbytes = start // size, -(-start * self.num_bits // 8)
            scales = message[at_scale : at_scale + SCALE_NBYTES * num_groups].clone().view(torch.float32)
            values = message[at : at + nbytes].clone()
            values = (values.view(torch.int8) if self.num_bits == 8 else values).view(num_groups, -1)
            found.append(_dequantize(Quantized(values, scales), self.num_bits, dtype)[:start])
            at_scale, at = at_scale + SCALE_NBYTES * num_groups, at + nbytes
        return found[0] if len(found) == 1 else torch.cat([*found, message.new_empty(0, dtype=dtype)])

    def _cuts(self, numel: int) -> list[tuple[int, int]]:
        """(elements, group size) of the whole groups and of the rest."""
        body = numel // self.group_size * self.group_size
        return [(n, size) for n, size in ((body, self.group_size), (numel - body, numel - body)) if n]

    def _pieces(self, x: Tensor) -> list[tuple[Tensor, int]]:
        pieces, at = [], 0
        for numel, size in self._cuts(x.numel()):
            pieces.append((x[at : at + numel], size))
            at += numel
        return pieces


def _quantize(x: Tensor, group_size: int, num_bits: int) -> Quantized:
    if num_bits == 4 and group_size % 2:  # two elements share a byte
        x, group_size = torch.cat([x, x.new_zeros(1)]), group_size + 1
    quantized: Quantized = pick("quantize", x.device.type)(x, group_size, num_bits)
    return quantized


def _dequantize(quantized: Quantized, num_bits: int, dtype: torch.dtype) -> Tensor:
    values: Tensor = pick("dequantize", quantized.values.device.type)(quantized, num_bits, dtype)
    return values


WEIGHTS = Code(8, 256)
"""8.125 bits an element."""
GRADIENTS = Code(4, 128)
"""4.25 bits an element: a gradient's few large elements set their group's scale, so groups are small."""
ERRORS = Code(8, 256)
"""How LoCo's errors rest."""
