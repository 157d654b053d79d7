"""Low-precision matrix products computed in fp32, on CPUs that have no instruction for them.

Entered by the engine around the forward of a bf16 or fp16 model on such a CPU. There torch's bf16 product runs scalar:
Linear 512 -> 2048 on 128 tokens takes 31 ms, the same with both operands widened 4 ms (Zen 3, AVX2, one thread).
Inputs, outputs and what autograd saves stay in low precision; only the product and its two gradients are widened, and
each result is rounded once, so the numbers are at least as good. Attention and pointwise kernels are fast as they are.

A torch function mode, not a patch: it is on while the model runs and nothing is replaced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

LOW = (torch.bfloat16, torch.float16)


@functools.lru_cache(maxsize=None)
def needs_wide_matmul(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of `dtype` faster by way of fp32."""
    if dtype not in LOW:
        return False
    capabilities = torch.cpu._is_avx512_bf16_supported() if dtype is torch.bfloat16 else False
    return not (capabilities or torch.cpu._is_amx_tile_supported())


class _WideLinear(torch.autograd.Function):
    """y = x W^T + b for x [..., in], W [out, in], b [out] or None, all low precision; fp32 inside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        wide = functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
        return wide.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        wide = grad.float()
        flat = wide.flatten(0, -2) if wide.dim() > 1 else wide.unsqueeze(0)
        rows = x.reshape(-1, x.shape[-1])
        grad_x = wide.matmul(weight.float()).to(x.dtype) if needs_x else None
        grad_weight = flat.t().mm(rows.float()).to(weight.dtype) if needs_weight else None
        grad_bias = flat.sum(0).to(grad.dtype) if ctx.has_bias and needs_bias else None
        return grad_x, grad_weight, grad_bias


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _WideLinear.apply(x, weight, bias)


def _widened(func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def product(*operands: Tensor, **kwargs: Any) -> Tensor:
        low = operands[0].dtype
        return func(*(x.float() if isinstance(x, Tensor) else x for x in operands), **kwargs).to(low)

    return product


_PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    functional.linear: _linear,
    **{
        func: _widened(func)
        for func in (torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, Tensor.matmul, Tensor.mm)
        + (Tensor.bmm, Tensor.__matmul__, Tensor.addmm, Tensor.baddbmm)
    },
}


class WideMatmul(TorchFunctionMode):
    """While on, low-precision CPU matrix products are computed in fp32."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        wide = _PRODUCTS.get(func)
        if wide is None or "out" in kwargs or not all(_is_low_cpu(x) for x in args if isinstance(x, Tensor)):
            return func(*args, **kwargs)
        return wide(*args, **kwargs)


def _is_low_cpu(x: Tensor) -> bool:
    return x.dtype in LOW and x.device.type == "cpu"
