"""Many tensors in one launch: a table of addresses in device memory, and chunks of equal size cut from all of them.

Used by the optimizers' kernels of this folder. A list of thousands of small tensors would cost a launch each; here a
program finds its tensor by its chunk.

    addresses [num_columns, num_tensors]   where each tensor begins; columns are parameter, gradient, states, ...
    numels    [num_tensors]                elements
    owners    [num_chunks]                 which tensor a chunk is of
    starts    [num_chunks]                 its first element there (64 bits: a tensor may have more than 2^31)
    firsts    [num_tensors + 1]            where each tensor's chunks begin

Tables are uploaded once and kept as long as the addresses stay, which they do: gradients of one bucket come in one
buffer. Elements are taken in memory order, so all tensors of one position must have one memory order without gaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 8192
"""Elements that one program takes: small enough that a million elements fill a large GPU, large enough that the look-up
of the tensor costs nothing."""

BLOCK = 1024
"""Elements at a time."""

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""What a column's elements may be; the arithmetic is fp32."""

Column = Sequence[Tensor]


@triton.jit
def narrow(x, to: tl.constexpr):
    """fp32 to `to`, to the nearest, ties to even. bf16 by integers: Triton's interpreter cuts the lower bits off."""
    if to == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x == x, rounded, 0x7FC0)
        out = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        out = x.to(to)
    return out


def widens(rows: Tensor) -> bool:
    """Whether factors become fp32 before they meet: Triton's interpreter multiplies bf16 as if it were integers."""
    # Triton before 3.4, torch 2.6's and 2.7's, has no `knobs` to ask; the interpreter's functions are of another class.
    return not isinstance(narrow, triton.JITFunction) and rows.dtype == torch.bfloat16


class Table(NamedTuple):
    """See the module's text."""

    addresses: Tensor
    numels: Tensor
    owners: Tensor
    starts: Tensor
    firsts: Tensor

    @property
    def num_chunks(self) -> int:
        """Programs of a launch."""
        return len(self.owners)


def takes(columns: Sequence[Column]) -> bool:
    """Whether the kernels take these lists: one dtype of `DTYPES` per column, no gaps, one memory order per position."""
    return all(
        tensor.dtype is column[0].dtype and tensor.dtype in DTYPES and _is_like(tensor, first)
        for column in columns
        for tensor, first in zip(column, columns[0], strict=True)
    )


def _is_like(tensor: Tensor, first: Tensor) -> bool:
    if tensor.numel() != first.numel() or tensor.device != first.device:
        return False
    if tensor.is_contiguous() and first.is_contiguous():
        return True
    return tensor.stride() == first.stride() and bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


class TableCache:
    """The tables of the last calls, by their addresses; a few, since an optimizer has a few groups and dtypes."""

    def __init__(self, max_kept: int = 32) -> None:
        self._tables: dict[tuple[int, ...], Table] = {}
        self._max_kept = max_kept

    def table(self, columns: Sequence[Column]) -> Table:
        """The table of these lists, uploaded if it is not the same as before. Does not wait for the device."""
        key = tuple(tensor.data_ptr() for column in columns for tensor in column) + tuple(t.numel() for t in columns[0])
        found = self._tables.pop(key, None)
        if found is None:
            found = make_table(columns)
            while len(self._tables) >= self._max_kept:
                del self._tables[next(iter(self._tables))]
        self._tables[key] = found
        return found


def make_table(columns: Sequence[Column]) -> Table:
    """Cut the tensors of the first column into chunks and upload addresses and chunks."""
    numels = torch.tensor([tensor.numel() for tensor in columns[0]], dtype=torch.int64)
    counts = (numels + CHUNK - 1) // CHUNK
    firsts = torch.zeros(len(numels) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=firsts[1:])
    owners = torch.repeat_interleave(torch.arange(len(numels)), counts)
    starts = (torch.arange(int(firsts[-1])) - firsts[owners]) * CHUNK
    addresses = torch.tensor([[tensor.data_ptr() for tensor in column] for column in columns], dtype=torch.int64)
    device = columns[0][0].device
    return Table(*(_upload(part, device) for part in (addresses, numels, owners, starts, firsts)))


def _upload(values: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)


def corrections(steps: Sequence[Tensor], betas: tuple[float, float], bias_correction: bool) -> Tensor:
    """[num_tensors, 2] fp32: 1 / (1 - beta^step) for both betas; ones without `bias_correction`. Stays on the device."""
    counts = torch.stack(list(steps)).double()
    if not bias_correction:
        return torch.ones(len(counts), 2, device=counts.device)
    powers = [torch.as_tensor(beta, dtype=torch.float64, device=counts.device).pow(counts) for beta in betas]
    return torch.stack([1 / (1 - power) for power in powers], dim=1).float().contiguous()
