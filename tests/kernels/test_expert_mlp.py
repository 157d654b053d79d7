"""Experts one after the other in the cache give what they give apart: outputs and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepspeed.kernels import onednn
from deepspeed.kernels.expert_mlp import Activation, AnyActivation, GatedSilu, expert_mlp
from deepspeed.kernels.pages import MIN_NBYTES, in_large_pages

S, WIDTH, INNER, OUT = 11, 6, 4, 5


def gated(up: Tensor) -> Tensor:
    gate, value = up.chunk(2, dim=-1)
    return F.silu(gate) * value


def apart(tokens: Tensor, at: Tensor, weights: Tensor, counts: list[int], up: Tensor, down: Tensor) -> Tensor:
    out = tokens.new_zeros(S, OUT)
    for e, rows in enumerate(at.split(counts)):
        start = sum(counts[:e])
        result = gated(tokens[rows] @ up[e]) @ down[e]
        out = out.index_add(0, rows, result * weights[start : start + len(rows)])
    return out


@pytest.mark.parametrize("activation", [AnyActivation(gated), GatedSilu()], ids=["traced", "formula"])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("counts", [[3, 0, 7, 1], [0, 0, 0, 0], [0, 0, 0, 22]])
def test_outputs_and_gradients_are_those_of_separate_steps(
    counts: list[int], is_transposed: bool, activation: Activation
) -> None:
    draw = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    at = torch.randint(S, (sum(counts),), generator=draw)
    tokens, weights = randn(S, WIDTH), randn(len(at), 1)
    up, down = randn(4, WIDTH, 2 * INNER), randn(4, INNER, OUT)
    if is_transposed:
        up, down = (matrix.transpose(1, 2).contiguous().transpose(1, 2) for matrix in (up, down))
    found: list[Any] = []
    for compute in (lambda *a: expert_mlp(*a, activation), apart):
        leaves = [tensor.detach().requires_grad_() for tensor in (tokens, weights, up, down)]
        out = compute(leaves[0], at, leaves[1], counts, *leaves[2:])
        gradients = torch.autograd.grad(out, leaves, tokens[:, :OUT] + 1, allow_unused=True)
        found.append(
            (out, *(g if g is not None else torch.zeros_like(x) for g, x in zip(gradients, leaves, strict=True)))
        )
    for mine, plain in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain)


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="a torch without oneDNN")
@pytest.mark.parametrize("function", [gated, lambda up: up.square().log()], ids=["gated", "infinite at 0"])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("counts", [[3, 0, 7, 1], [0, 0, 0, 0], [0, 0, 0, 22]])
def test_rows_that_are_filled_up_for_onednn_change_nothing(
    counts: list[int], is_transposed: bool, function: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    at = torch.randint(S, (sum(counts),))
    tokens, weights = torch.randn(S, WIDTH), torch.randn(len(at), 1)
    up, down = torch.randn(4, WIDTH, 2 * INNER), torch.randn(4, INNER if function is gated else 2 * INNER, OUT)
    if is_transposed:
        up, down = (matrix.transpose(1, 2).contiguous().transpose(1, 2) for matrix in (up, down))
    found = []
    for is_taken in (True, False):
        monkeypatch.setattr(onednn, "takes", lambda *_, answer=is_taken: answer)
        leaves = [tensor.detach().requires_grad_() for tensor in (tokens, weights, up, down)]
        out = expert_mlp(leaves[0], at, leaves[1], counts, *leaves[2:], AnyActivation(function))
        found.append((out, *torch.autograd.grad(out, leaves, tokens[:, :OUT] + 1)))
    for mine, plain in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)


def test_frozen_matrices_have_no_gradient_and_tokens_have() -> None:
    tokens = torch.randn(S, WIDTH, requires_grad=True)
    up, down = torch.randn(1, WIDTH, 2 * INNER), torch.randn(1, INNER, OUT)
    expert_mlp(tokens, torch.arange(S), torch.ones(S, 1), [S], up, down, GatedSilu()).sum().backward()
    assert tokens.grad is not None and up.grad is None and down.grad is None


def test_large_pages_change_no_value() -> None:
    tensor = in_large_pages(torch.empty(MIN_NBYTES // 4 + 3))
    assert tensor.fill_(2.0).sum() == 2 * (MIN_NBYTES // 4 + 3)
    small = torch.ones(3)
    assert in_large_pages(small) is small
