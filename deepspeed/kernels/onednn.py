"""Products of fp32 matrices in main memory by oneDNN, where it is faster than the BLAS that torch was built with.

Used for experts alone (`expert_mlp`, `parallel.expert.experts`), whose products come by the dozen and whose results are compared
to rounding, not to the bit. torch's BLAS leaves wide registers of other makers' processors unused: 105 GF/s against 230 of oneDNN
for 512 rows by 256 x 1024 (EPYC 9005, MKL 2024.2, one thread). Where both are as fast, oneDNN is left out. Which is faster is
timed once in a process, on one product, and has to be clear, so that it does not hang on what else the machine does.

oneDNN compiles a kernel per shape (1 ms), and experts have another number of rows at every step. So rows are filled up with zeros to one of
16 numbers per power of two (`room`).

Invariant: the same products to rounding; a tensor that is not plain (fake, sharded, traced) is never taken.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

MIN_NUMEL = 1 << 21
"""Multiplications below which a call costs more than is saved."""
CLEARLY = 1.25
"""How much faster oneDNN has to be."""


def room(num_rows: int) -> int:
    """The number of rows, at least `num_rows`, that are multiplied in their place: 1/16 more at most, from 64 rows on."""
    step = max(4, 1 << max(0, num_rows.bit_length() - 5))
    return -(-num_rows // step) * step


def times(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left [m, k] times right [k, n], plus bias [n]; any strides, a result of its own, unseen by autograd."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")
    return result


@functools.cache
def is_faster() -> bool:
    """Whether oneDNN multiplies clearly faster than torch's BLAS here. Timed once, in some milliseconds."""
    try:
        with _disable_current_modes(), torch.no_grad():
            left, right = torch.ones(256, 512), torch.ones(512, 512)
            ways: list[Callable[[Tensor, Tensor], Tensor]] = [torch.mm, times]
            best = [float("inf")] * len(ways)
            for _ in range(7):
                for i, way in enumerate(ways):
                    start = time.perf_counter()
                    way(left, right)
                    best[i] = min(best[i], time.perf_counter() - start)
    except (AttributeError, RuntimeError):  # a torch without oneDNN
        return False
    return best[0] > CLEARLY * best[1]


def takes(num_rows: int, *tensors: Tensor) -> bool:
    """Whether to multiply `num_rows` rows by matrices [..., k, n] like these here: wide enough, plain, fp32, in main memory."""
    if not all(is_plain(tensor) for tensor in tensors) or torch.are_deterministic_algorithms_enabled():
        return False
    smallest = min(tensor.shape[-1] * tensor.shape[-2] for tensor in tensors)
    return num_rows * smallest >= MIN_NUMEL and _get_current_fake_mode() is None and is_faster()


def _get_current_fake_mode() -> Any:
    """A mode that makes tensors without memory, if one is on."""
    mode = _get_current_dispatch_mode()
    return mode if isinstance(mode, torch._subclasses.FakeTensorMode) else None


def is_plain(tensor: Tensor) -> bool:
    """Whether it has fp32 values of its own in main memory: not fake, sharded or traced."""
    is_own = type(tensor) is Tensor or type(tensor).__torch_function__ is torch._C._disabled_torch_function_impl
    return is_own and tensor.dtype is torch.float32 and tensor.device.type == "cpu" and tensor.layout is torch.strided


class Linear(torch.autograd.Function):
    """x W^T + b for x [m, k], W [n, k], b [n] or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See the class."""
        ctx.save_for_backward(x, weight)
        return _first_rows(times(_filled(x), weight.t(), bias), len(x))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Two more products; where a gradient of the gradient may be wanted, torch's."""
        x, weight = ctx.saved_tensors
        gradient = gradients[0]
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        of_bias = gradient.sum(0) if needs_bias else None
        if torch.is_grad_enabled():
            return gradient @ weight if needs_x else None, gradient.t() @ x if needs_weight else None, of_bias
        filled = _filled(gradient)
        of_x = _first_rows(times(filled, weight), len(x)) if needs_x else None
        return of_x, times(filled.t(), _filled(x)) if needs_weight else None, of_bias


def _filled(rows: Tensor) -> Tensor:
    """`rows` [m, k], with zeros below them up to their room."""
    num = room(len(rows))
    return rows.contiguous() if num == len(rows) else functional.pad(rows, (0, 0, 0, num - len(rows)))


def _first_rows(result: Tensor, num_rows: int) -> Tensor:
    """The first of a result's rows, in its memory; no view, which could not be written in place."""
    if len(result) == num_rows:
        return result
    return result.new_empty(0).set_(result.untyped_storage(), 0, (num_rows, result.shape[1]), (result.shape[1], 1))


class LinearByOneDNN(TorchFunctionMode):
    """While on, `torch.nn.functional.linear` of rows [m, k] is computed here, where that is faster."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See the class."""
        if func is not functional.linear:
            return func(*args, **(kwargs or {}))
        return _linear(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    given = (input, weight) if bias is None else (input, weight, bias)
    if input.dim() != 2 or weight.dim() != 2 or not all(is_plain(tensor) for tensor in given):
        return functional.linear(input, weight, bias)
    if not takes(len(input), weight) or torch.is_autocast_enabled("cpu"):
        return functional.linear(input, weight, bias)
    result: Tensor = Linear.apply(input, weight, bias)
    return result


def may_help(rows: Tensor) -> bool:
    """Whether layers that get such rows may be put in the mode: eager, and nothing else watches torch's functions."""
    return (
        is_plain(rows)
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_function_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and is_faster()
    )
