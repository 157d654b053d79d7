"""Rows in groups, each group times a matrix of its own: what a rank's experts compute, forward and backward.

Called by `parallel.expert`. Implementations with the same results to rounding:

    loop       one product per group, written into place: few large groups
    grouped    torch's grouped product: many groups, or low precision; kept off its failing cases (no rows at all, rows of
               a byte length that is no multiple of 16, an expanded incoming gradient; torch 2.13)

Which is faster depends on the machine, the dtype and the rows per group; `Trial` times both once per kind of product,
forward and backward, and remembers. Where torch is asked for deterministic algorithms nothing is timed: the loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

from deepspeed.kernels.pages import in_large_pages
from deepspeed.kernels.table import pick
from deepspeed.utils.values import has_values

Product = Callable[[Tensor, Tensor, "Sequence[int]"], Tensor]
"""(rows [n, in], weight [groups, in, out], rows per group) -> [n, out]."""


class Looped(torch.autograd.Function):
    """One product per group, each written into its part of the result."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
        """See Product."""
        ctx.save_for_backward(rows, weight)
        ctx.counts = counts
        return _multiply(rows, weight, counts)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Two more products per group; a group without rows has a gradient of zeros."""
        rows, weight = ctx.saved_tensors
        gradient = gradients[0]
        of_rows = _multiply(gradient, weight.transpose(1, 2), ctx.counts) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_rows, None, None
        of_weight = in_large_pages(torch.empty_like(weight))  # as strided as the weight: transposed where that is
        parts = zip(rows.split(ctx.counts), gradient.split(ctx.counts), of_weight.unbind(), strict=True)
        for part, gradient_part, into in parts:
            if not len(part):
                into.zero_()
            elif into.is_contiguous():
                torch.mm(part.t(), gradient_part, out=into)
            else:
                torch.mm(gradient_part.t(), part, out=into.t())
        return of_rows, of_weight, None


def _multiply(rows: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
    out = in_large_pages(rows.new_empty(len(rows), weight.shape[2]))
    # unbind, not weight[i]: indexing in the loop costs 3 to 20 times the product for small groups.
    for part, matrix, into in zip(rows.split(counts), weight.unbind(), out.split(counts), strict=True):
        if len(part):
            torch.mm(part, matrix, out=into)
    return out


class _Contiguous(torch.autograd.Function):
    """The same values; what comes back is contiguous."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0].contiguous()


def looped(rows: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
    """See Product."""
    result: Tensor = Looped.apply(rows, weight, list(counts))
    return result


def grouped(rows: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
    """See Product."""
    ends = torch.tensor(counts, device=rows.device).cumsum(0).int()
    result: Tensor = _Contiguous.apply(torch._grouped_mm(rows.contiguous(), weight, offs=ends))
    return result


def can_group(rows: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped product takes these."""
    sizes = (rows.shape[1] * rows.element_size(), weight.shape[2] * rows.element_size())
    return hasattr(torch, "_grouped_mm") and len(rows) > 0 and all(size % 16 == 0 for size in sizes)


MAX_TIMED_ROWS = 4096
"""Rows of a trial: more take longer and decide nothing."""


class Ways(NamedTuple):
    """What may be tried beside the loop."""

    grouped: bool = True
    triton: bool = True


EVERY_WAY = Ways()


def candidates(rows: Tensor, weight: Tensor, ways: Ways) -> list[Product]:
    """The products that take these, the loop first."""
    found: list[Product] = [looped]
    if ways.grouped and can_group(rows, weight):
        found.append(grouped)
    ours = pick("grouped_product", rows.device.type) if ways.triton and len(rows) else None
    if ours is not None and rows.dtype in (torch.float32, torch.bfloat16, torch.float16):
        found.append(ours)
    return found


class Trial:
    """Which product is faster, by kind: timed at the kind's first use, then remembered."""

    def __init__(self) -> None:
        self.chosen: dict[tuple[Any, ...], Product] = {}

    def choose(self, rows: Tensor, weight: Tensor, ways: Ways = EVERY_WAY) -> Product:
        """The product for rows like these. Takes a few milliseconds at a kind's first use."""
        if torch.are_deterministic_algorithms_enabled() or not has_values(rows):
            return looped  # what has no values takes no time
        products = candidates(rows, weight, ways)
        if len(products) == 1:
            return looped
        each = max(1, len(rows) // len(weight))
        kind = (
            rows.dtype,
            rows.device.type,
            tuple(weight.shape),
            weight.stride(),
            each.bit_length(),
            len(products),
            ways,
        )
        if kind not in self.chosen:
            self.chosen[kind] = min(products, key=lambda product: self._time(product, rows, weight))
        return self.chosen[kind]

    def _time(self, product: Product, rows: Tensor, weight: Tensor) -> float:
        num = min(len(rows), MAX_TIMED_ROWS)
        counts = [num // len(weight) + (i < num % len(weight)) for i in range(len(weight))]
        best = float("inf")
        # Unseen by what watches and by checkpoints, which count what is saved: what a trial multiplies is not the model's.
        with _disable_current_modes(), saved_tensors_hooks(_same, _same), torch.enable_grad():
            sample = rows[:num].detach().clone().requires_grad_()
            matrices = weight.detach().requires_grad_()
            for _ in range(3):
                _wait(rows.device)
                start = time.perf_counter()
                result = product(sample, matrices, counts)
                torch.autograd.grad(result, (sample, matrices), torch.zeros_like(result))
                _wait(rows.device)
                best = min(best, time.perf_counter() - start)
        return best


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


TRIAL = Trial()
"""The process's; what is faster is the machine's."""


def grouped_product(rows: Tensor, weight: Tensor, counts: Sequence[int], ways: Ways = EVERY_WAY) -> Tensor:
    """rows [n, in], `counts[g]` of them for group g in order, times weight [groups, in, out]; [n, out].

    Weights that lie as [groups, out, in] are handed in transposed.
    """
    return TRIAL.choose(rows, weight, ways)(rows, weight, counts)
