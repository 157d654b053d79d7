"""FPDT's layers, chunk by chunk on two ranks, equal the whole ones in one process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from deepspeed.sequence.fpdt_layer import FPDT_FFN, FPDT_Attention, FPDT_InputConstruct, FPDT_LogitsLoss
from deepspeed.sequence.layer import apply_rotary_pos_emb
from deepspeed.utils.errors import DeepSpeedError
from tests.harness import run_ranks

LENGTH, WIDTH, HEADS, KV, CHUNK = 16, 24, 4, 2, 8
ARGS = SimpleNamespace(ds_sequence_parallel_fpdt_chunk_size=CHUNK)
CONFIG = SimpleNamespace(num_attention_heads=HEADS, num_key_value_heads=KV)


def weights() -> list[Tensor]:
    """Of the fused projection and of the output, and angles of the rotation."""
    torch.manual_seed(2)
    rows = (HEADS + 2 * KV) * WIDTH // HEADS
    made = [torch.randn(rows, WIDTH) * 0.2, torch.randn(rows), torch.randn(WIDTH, WIDTH) * 0.2, torch.randn(WIDTH)]
    return [t.requires_grad_() for t in made]


def hidden() -> tuple[Tensor, Tensor, Tensor]:
    """[s, b, h], the outer gradient, and angles."""
    make = torch.Generator().manual_seed(3)
    x, grad = (torch.randn(LENGTH, 2, WIDTH, generator=make) for _ in range(2))
    angle = torch.arange(LENGTH).view(-1, 1, 1, 1) * torch.tensor([1.0, 0.1, 1.0, 0.1])
    return x, grad, angle


def whole_attention(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, angle: Tensor) -> Tensor:
    """In plain PyTorch."""
    mixed = F.linear(x, w1, b1).unflatten(-1, (KV, HEADS // KV + 2, WIDTH // HEADS))
    q, k, v = (t.flatten(2, 3) for t in mixed.split([HEADS // KV, 1, 1], -2))
    q, k = (apply_rotary_pos_emb(t, angle.cos(), angle.sin()) for t in (q, k))
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return F.linear(out.permute(2, 0, 1, 3).flatten(2), w2, b2)


def order(rank: int, world: int) -> Tensor:
    """The positions that a rank has."""
    positions = torch.arange(LENGTH)[None]
    found = FPDT_InputConstruct(positions, None, None, None, None, ARGS, world, rank).generate()[0]
    assert found is not None
    return found[0]


def test_chunks_of_all_ranks_together_are_pieces_of_the_sequence() -> None:
    assert order(0, 2).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert order(1, 2).tolist() == [4, 5, 6, 7, 12, 13, 14, 15]
    with pytest.raises(DeepSpeedError, match="16 tokens in chunks of 8 over 3 ranks"):
        order(0, 3)


def attend(rank: int, world: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, and gradients of the input and of the weights."""
    own = order(rank, world)
    x, grad, angle = hidden()
    part, made = x[own].clone().requires_grad_(), weights()
    layer = FPDT_Attention(CONFIG, *made, dist.group.WORLD, return_bias=False, chunk_size=CHUNK)
    output, bias = layer(part, rotary_pos_emb=angle)
    assert bias is None
    output.backward(grad[own])
    return output.detach(), part.grad, [t.grad for t in made]


def test_attention_by_chunks_equals_the_whole() -> None:
    x, grad, angle = hidden()
    x.requires_grad_()
    made = weights()
    whole = whole_attention(x, *made, angle)
    whole.backward(grad)
    found = run_ranks(2, attend)
    for rank, (output, grad_x, _) in enumerate(found):
        own = order(rank, 2)
        torch.testing.assert_close(output, whole.detach()[own], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad_x, x.grad[own], rtol=1e-5, atol=1e-6)
    for n, weight in enumerate(made):
        torch.testing.assert_close(found[0][2][n] + found[1][2][n], weight.grad, rtol=1e-4, atol=1e-5)


def lose(rank: int, world: int) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of all tokens, and gradients of this rank's states and of the head."""
    states, labels, head = loss_inputs()
    part = states.tensor_split(world)[rank].clone().requires_grad_()
    losses = FPDT_LogitsLoss.apply(part, labels.tensor_split(world, 1)[rank], head, rank, world, dist.group.WORLD, 3)
    losses.mean().backward()
    return losses.detach(), part.grad, head.grad


def loss_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """[s, b, h], [b, s], [vocabulary, h]."""
    torch.manual_seed(6)
    return torch.randn(LENGTH, 2, WIDTH), torch.randint(9, (2, LENGTH)), torch.randn(9, WIDTH, requires_grad=True)


def test_losses_by_chunks_equal_the_whole() -> None:
    states, labels, head = loss_inputs()
    states.requires_grad_()
    whole = F.cross_entropy((states @ head.T).flatten(0, 1), labels.T.flatten(), reduction="none").view(LENGTH, 2)
    whole.mean().backward()
    found = run_ranks(2, lose)
    for losses, _, _ in found:
        torch.testing.assert_close(losses, whole.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat([grad for _, grad, _ in found]), states.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found[0][2] + found[1][2], head.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("add_bias", [True, False])
def test_the_mlp_by_chunks_equals_the_whole(add_bias: bool) -> None:
    torch.manual_seed(1)
    shapes: list[Any] = [(LENGTH, 2, 6), (12, 6), (12,), (6, 12), (6,)]
    x, w1, b1, w2, b2 = (torch.randn(*shape, requires_grad=True) for shape in shapes)
    output, bias = FPDT_FFN.apply(x, w1, b1, w2, b2, add_bias, 5)
    whole = F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2 if add_bias else None)
    assert bias is (None if add_bias else b2)
    torch.testing.assert_close(output, whole, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(
        torch.autograd.grad(output.square().sum(), (x, w1, w2)),
        torch.autograd.grad(whole.square().sum(), (x, w1, w2)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
