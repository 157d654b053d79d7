"""`linear_cross_entropy`: the loss and gradients of torch's own functions, a tile's logits at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deepspeed.parallel.sequence import linear_loss

HIDDEN, VOCAB = 12, 37


def case(dtype: torch.dtype, *, bias: bool, length: int = 23) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(3)
    head = nn.Linear(HIDDEN, VOCAB, bias=bias).to(dtype)
    x = torch.randn(2, length, HIDDEN).to(dtype).requires_grad_()
    targets = torch.randint(VOCAB, (2, length))
    targets[0, :5] = targets[1, 9] = linear_loss.IGNORED
    return head, x, targets


def whole(head: nn.Linear, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(head(x).float().flatten(0, -2), targets.flatten(), reduction=reduction)


def found(head: nn.Linear, x: Tensor, loss: Tensor, factor: float) -> list[Any]:
    given = [x, *head.parameters()]
    return [loss.detach(), *torch.autograd.grad(loss * factor, [t for t in given if t.requires_grad])]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("dtype", "bias"), [(torch.float32, True), (torch.float32, False), (torch.float64, True)])
def test_it_equals_the_whole(dtype: torch.dtype, bias: bool, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_loss, "SLICE", 3 * VOCAB)
    head, x, targets = case(dtype, bias=bias)
    ours = linear_loss.linear_cross_entropy(head, x, targets, 7, reduction=reduction)
    for got, want in zip(
        found(head, x, ours, 3.0), found(head, x, whole(head, x, targets, reduction), 3.0), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_the_truth_as_the_whole(dtype: torch.dtype) -> None:
    head, x, targets = case(dtype, bias=True, length=300)
    exact_head, exact_x = nn.Linear(HIDDEN, VOCAB).double(), x.detach().double().requires_grad_()
    exact_head.load_state_dict({name: value.double() for name, value in head.state_dict().items()})
    truth = found(exact_head, exact_x, whole(exact_head, exact_x, targets, "mean"), 1.0)
    ours = found(head, x, linear_loss.linear_cross_entropy(head, x, targets, 16), 1.0)
    theirs = found(head, x, whole(head, x, targets, "mean"), 1.0)
    for got, plain, want in zip(ours, theirs, truth, strict=True):
        error, allowed = (got.double() - want).norm() / want.norm(), (plain.double() - want).norm() / want.norm()
        assert error <= 1.5 * allowed + 1e-6


def test_under_autocast_it_computes_as_autocast_would() -> None:
    head, x, targets = case(torch.float32, bias=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_loss.linear_cross_entropy(head, x, targets, 64)
        theirs = whole(head, x, targets, "mean")
    for got, want in zip(found(head, x, ours, 1.0), found(head, x, theirs, 1.0), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_frozen_heads_nothing_to_learn_and_two_backwards_through_one_graph() -> None:
    head, x, targets = case(torch.float32, bias=True)
    none = linear_loss.linear_cross_entropy(head, x, torch.full_like(targets, linear_loss.IGNORED), 8)
    assert none.item() == 0 and not any(grad.any() for grad in torch.autograd.grad(none, [x, *head.parameters()]))
    head.requires_grad_(False)
    loss = linear_loss.linear_cross_entropy(head, x, targets, 8)
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss * 2, x)[0], 2 * first)
    with torch.no_grad():
        assert torch.equal(linear_loss.linear_cross_entropy(head, x, targets, 8), loss)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_loss.linear_cross_entropy(head, x, torch.full_like(targets, VOCAB), 8)


class Largest(TorchDispatchMode):
    """How many elements the largest results of operations have, and how many results are as large as that."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.storages[tensor.untyped_storage()._cdata] = tensor.numel()
        return out


def test_nothing_of_the_size_of_a_tiles_logits_exists_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_loss, "SLICE", 2 * VOCAB)
    head, x, targets = case(torch.float32, bias=False, length=64)
    with Largest() as seen:
        linear_loss.linear_cross_entropy(head, x, targets, 64).backward()
    large = [size for size in seen.storages.values() if size > 2 * VOCAB and size not in (VOCAB * HIDDEN, x.numel())]
    assert set(large) <= {64 * VOCAB, 64 * HIDDEN, 2 * 64}
    assert large.count(64 * VOCAB) <= 2, "one for each tile"
