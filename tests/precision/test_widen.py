"""Widened products are at least as exact as the CPU's own, in value and gradient, wherever the module runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import deepspeed
from deepspeed.activation.call import non_reentrant_checkpoint
from deepspeed.precision import WideMatmul, Widening, needs_wide_matmul, widen

LOW = (torch.bfloat16, torch.float16)
PRODUCTS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "linear with bias": (F.linear, [(2, 5, 64), (32, 64), (32,)]),
    "linear": (F.linear, [(5, 64), (32, 64)]),
    "linear of one row": (F.linear, [(64,), (32, 64), (32,)]),
    "linear by name": (lambda x, w, b: F.linear(input=x, weight=w, bias=b), [(5, 64), (32, 64), (32,)]),
    "linear to a scalar": (F.linear, [(5, 64), (64,)]),
    "matmul": (torch.matmul, [(3, 5, 64), (64, 7)]),
    "matmul by name": (lambda x, y: torch.matmul(input=x, other=y), [(5, 64), (64, 7)]),
    "operator": (lambda x, y: x @ y, [(5, 64), (64, 7)]),
    "bmm": (torch.bmm, [(3, 5, 64), (3, 64, 7)]),
    "addmm": (torch.addmm, [(7,), (5, 64), (64, 7)]),
    "addmm with factors": (lambda c, x, y: torch.addmm(c, x, y, beta=0.5, alpha=2.0), [(5, 7), (5, 64), (64, 7)]),
    "baddbmm": (torch.baddbmm, [(3, 5, 7), (3, 5, 64), (3, 64, 7)]),
}


def values_and_gradients(product: Callable[..., Tensor], operands: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in operands]
    out = product(*leaves)
    out.backward(torch.ones_like(out))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_values_and_gradients_are_at_least_as_exact_as_native_ones(name: str, dtype: torch.dtype) -> None:
    product, shapes = PRODUCTS[name]
    generator = torch.Generator().manual_seed(0)
    operands = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    exact = values_and_gradients(product, [x.double() for x in operands])
    native = values_and_gradients(product, operands)
    with WideMatmul():
        wide = values_and_gradients(product, operands)
    for got, other, want in zip(wide, native, exact, strict=True):
        assert got.dtype == dtype
        assert got.shape == want.shape
        assert (got - want).abs().max() <= (other - want).abs().max() + torch.finfo(dtype).eps * want.abs().max() / 2


def test_fp32_products_are_left_alone() -> None:
    x, w = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    with WideMatmul():
        assert "WideLinear" not in type(F.linear(x, w).grad_fn).__name__
    assert not needs_wide_matmul(torch.float32)


def test_mixed_dtypes_are_refused_as_torch_does() -> None:
    with WideMatmul(), pytest.raises(RuntimeError, match="dtype"):
        torch.mm(torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(2, 2, dtype=torch.float16))


class Attention(nn.Module):
    """Products by module, operator and function, as in a transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return x + self.out(torch.bmm((q @ k.transpose(1, 2)).softmax(-1), v))


def run_blocks(run: Callable[[nn.Module, Tensor], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    blocks = nn.ModuleList(Attention() for _ in range(2)).to(torch.bfloat16)
    widening = Widening(blocks.modules())
    x = torch.randn(2, 4, 16).to(torch.bfloat16).requires_grad_()
    y = x
    for block in blocks:
        y = run(block, y)
    y.float().square().mean().backward()
    widening.detach()
    assert x.grad is not None
    return x.grad, {name: param.grad for name, param in blocks.named_parameters() if param.grad is not None}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputing_in_a_plain_backward_gives_the_same_gradients(use_reentrant: bool) -> None:
    def recomputing(block: nn.Module, x: Tensor) -> Any:
        return checkpoint(block, x, use_reentrant=use_reentrant)

    x_grad, grads = run_blocks(lambda block, x: block(x))
    x_grad_again, grads_again = run_blocks(recomputing)
    assert torch.equal(x_grad, x_grad_again)
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)
    assert len(grads_again) == len(grads)


class Inner(nn.Module):
    """Multiplies in a method of its own, by itself and by a module; the method is checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.linear = nn.Parameter(torch.randn(16, 16)), nn.Linear(16, 16)
        self.run: Callable[..., Any] = lambda function, *args: function(*args)

    def inner(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.linear(x) @ self.weight, self.weight).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.run(self.inner, x)


def _inner_gradients(run: Callable[..., Any] | None, low: bool = True, widens: bool = True) -> list[Tensor]:
    torch.manual_seed(0)
    model = Inner()
    x = torch.randn(8, 16)
    if low:
        model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)
    model.run = run or model.run
    widening = Widening(model.modules() if low and widens else ())
    model(x.requires_grad_()).float().square().mean().backward()
    widening.detach()
    assert x.grad is not None
    return [x.grad, *(param.grad for param in model.parameters() if param.grad is not None)]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_method_that_multiplies_by_itself_is_recomputed_as_it_ran(use_reentrant: bool) -> None:
    checkpointed = _inner_gradients(functools.partial(checkpoint, use_reentrant=use_reentrant))
    native, exact = _inner_gradients(None, widens=False), _inner_gradients(None, low=False)
    for found, lows, wanted in zip(checkpointed, native, exact, strict=True):
        assert (found - wanted).norm() < 1.2 * (lows - wanted).norm()


@pytest.mark.parametrize("ours", [deepspeed.checkpointing.checkpoint, non_reentrant_checkpoint])
def test_our_own_checkpoints_carry_the_mode_into_the_recomputation(ours: Callable[..., Any]) -> None:
    for found, wanted in zip(_inner_gradients(ours), _inner_gradients(None), strict=True):
        assert torch.equal(found, wanted)


def test_recomputation_is_widened_too(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = widen._WideLinear.apply
    monkeypatch.setattr(widen._WideLinear, "apply", lambda *args: calls.append(1) or original(*args))
    run_blocks(lambda block, x: block(x))
    plain = len(calls)
    run_blocks(lambda block, x: checkpoint(block, x, use_reentrant=False))
    assert len(calls) == plain + 2 * plain


def test_the_mode_is_off_outside_of_modules_and_after_an_error() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ZeroDivisionError

    model = nn.Sequential(nn.Linear(2, 2), Failing())
    widening = Widening(model.modules())
    with pytest.raises(ZeroDivisionError):
        model(torch.ones(1, 2))
    assert torch.overrides._get_current_function_mode_stack() == []
    assert widening._depth == 0
