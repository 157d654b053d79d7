"""Low-precision matrix products computed in fp32, on CPUs that have no instruction for them.

Put by the engine around the modules of a bf16 or fp16 model on such a CPU. There torch's bf16 product runs scalar:
Linear 512 -> 2048 on 128 tokens takes 31 ms, the same with both operands widened 4 ms (Zen 3, AVX2, one thread).
Inputs, outputs and what autograd saves stay in low precision; only the product and its two gradients are widened, and
each result is rounded once, so the numbers are at least as good. Attention and pointwise kernels are fast as they are.

A torch function mode, not a patch: it is on while the model runs and nothing is replaced.

Note [Recomputation multiplies as the forward did]
    A checkpoint runs a function again in backward, where the mode is on only inside of modules. What a checkpointed
    function multiplies by itself (`checkpoint(self.inner, x)`) would be wide in forward and torch's own in backward, and
    not reentrant checkpoints find that what is saved differs. So the mode stands on a `Ground`: what it was like when the
    innermost module was entered. Where that has changed (saved-tensor hooks on top, grad mode off, a backward running) a
    checkpoint may have begun in between, and products are left to torch, in both runs alike. Our own checkpoints carry
    the mode along instead (`carried`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._pytree import tree_map_only

from deepspeed.utils.saved_hooks import top_saved_hooks

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


def _linear(low: torch.dtype, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.dim() != 2:
        return _widened(functional.linear)(low, input, weight, bias)
    return _WideLinear.apply(input, weight, bias)


def _widened(func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def product(low: torch.dtype, *args: Any, **kwargs: Any) -> Tensor:
        args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
        return func(*args, **kwargs).to(low)

    return product


_PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    functional.linear: _linear,
    **{
        func: _widened(func)
        for func in (
            *(torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm),
            *(Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.addmm, Tensor.baddbmm, Tensor.__matmul__),
        )
    },
}


class Ground(NamedTuple):
    """What a checkpoint changes; see Note [Recomputation multiplies as the forward did]."""

    grad_enabled: bool
    hooks: Any
    """The saved-tensor hooks on top."""
    backward: int
    """The backward that is running."""

    @classmethod
    def now(cls) -> Ground:
        """As it is in this thread."""
        hooks = top_saved_hooks()
        return cls(torch.is_grad_enabled(), hooks, torch._C._current_graph_task_id())


class Widening:
    """Keeps `WideMatmul` on while any of some modules runs: in forward, and where backward runs modules again.

    Hooks of modules, because a mode that is on around forward alone is off when an activation checkpoint recomputes in
    the user's `loss.backward()`; and a hook of backward cannot turn it on for other nodes, since autograd restores the
    state of the thread after each.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._mode = WideMatmul()
        self._depth = 0
        self._handles: list[Any] = []
        for module in modules:
            self._handles += [
                module.register_forward_pre_hook(self._enter, prepend=True),
                module.register_forward_hook(self._leave, always_call=True),
            ]

    def _enter(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if self._depth == 0:
            self._mode.__enter__()
        self._depth += 1
        self._mode.grounds.append(Ground.now())

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._mode.grounds.pop()
        self._depth -= 1
        if self._depth == 0:
            self._mode.__exit__(None, None, None)

    def __reduce__(self) -> Any:
        """A copy of a module takes one along that has no modules, but widens the copy."""
        return Widening, ((),)

    def detach(self) -> None:
        """Take the hooks away; products are torch's own from then on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class WideMatmul(TorchFunctionMode):
    """While on, low-precision CPU matrix products are computed in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.grounds: list[Ground] = []
        """Of the modules that are running."""

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """The mode on, and on new ground: for a function whose recomputation is run in here too."""
        is_on = self in _get_current_function_mode_stack()
        self.grounds.append(Ground.now())
        try:
            with contextlib.nullcontext() if is_on else self:
                yield
        finally:
            self.grounds.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        wide = _PRODUCTS.get(func)
        if wide is None or "out" in kwargs or "out_dtype" in kwargs:
            return func(*args, **kwargs)
        kinds = {(x.dtype, x.device.type) for x in (*args, *kwargs.values()) if isinstance(x, Tensor)}
        if kinds not in _WIDENED or (self.grounds and self.grounds[-1] != Ground.now()):
            return func(*args, **kwargs)
        return wide(next(iter(kinds))[0], *args, **kwargs)


def carried() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """What a function has to run in, now and again, to multiply as it would now: the mode, if it is on."""
    on = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, WideMatmul)]
    return on[-1].again if on else contextlib.nullcontext


_WIDENED = [{(dtype, "cpu")} for dtype in LOW]
"""Operands are widened if they are all of one of these kinds; mixed ones are torch's to refuse."""
