"""Cross entropy of logits in parts equals torch's of whole ones: losses and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from deepspeed.sequence.cross_entropy import vocab_parallel_cross_entropy, vocab_sequence_parallel_cross_entropy
from deepspeed.sequence.linear_cross_entropy import vocab_parallel_linear_cross_entropy
from deepspeed.sequence.vocab_parallel_ops import (
    vocab_parallel_entropy,
    vocab_parallel_kl_div,
    vocab_parallel_logprobs,
)
from deepspeed.utils.errors import DeepSpeedError
from tests.harness import run_ranks


def whole() -> tuple[Tensor, Tensor]:
    """Logits [s, b, vocabulary] and targets, some of which are ignored."""
    torch.manual_seed(4)
    logits, target = torch.randn(6, 2, 9) * 5, torch.randint(9, (6, 2))
    target[1:3, 0] = -100
    return logits, target


def in_parts(rank: int, world: int) -> dict[str, list[Tensor]]:
    """Loss and gradient of this rank's logits: of a part of the vocabulary, of a part of the sequence."""
    logits, target = whole()
    group = dist.group.WORLD
    vocabulary = logits.tensor_split(world, dim=-1)[rank].clone().requires_grad_()
    bounds = (0, 5) if rank == 0 else (5, 9)
    by_vocabulary = vocab_parallel_cross_entropy(vocabulary, target, group, None, *bounds)
    by_vocabulary.backward()
    part, labels = logits.tensor_split(world)[rank].clone().requires_grad_(), target.tensor_split(world)[rank]
    by_sequence = vocab_parallel_cross_entropy(part, labels, sp_group=group)
    by_sequence.backward()
    own = part.detach().clone().requires_grad_()
    tokens = vocab_sequence_parallel_cross_entropy(own, labels, group)
    (tokens.sum() / (target != -100).sum()).backward()
    alone = part.detach().clone().requires_grad_()
    joined = vocab_parallel_cross_entropy(alone, labels, sp_group=group, reduction="none", gather_sequence_loss=True)
    (joined.sum() / (target != -100).sum() / world).backward()  # every rank's gradient counts
    return {
        "joined": [joined.detach(), alone.grad],
        "vocabulary": [by_vocabulary.detach(), vocabulary.grad],
        "sequence": [by_sequence.detach(), part.grad],
        "tokens": [tokens.detach(), own.grad],
    }


def test_parts_of_the_vocabulary_and_of_the_sequence_give_the_whole_loss_and_its_gradient() -> None:
    logits, target = whole()
    logits.requires_grad_()
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    loss.backward()
    tokens = F.cross_entropy(logits.detach().flatten(0, 1), target.flatten(), reduction="none").view(6, 2)
    found = run_ranks(2, in_parts)
    for name, dim, value in (
        ("vocabulary", 2, loss),
        ("sequence", 0, loss),
        ("tokens", 0, tokens),
        ("joined", 0, tokens),
    ):
        for own in found:
            torch.testing.assert_close(own[name][0], value.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(torch.cat([own[name][1] for own in found], dim), logits.grad, rtol=1e-5, atol=1e-7)


def of_parts(rank: int, world: int) -> dict[str, list[Tensor]]:
    """Values and gradients of what is asked of logits [6, 2, 8] by their halves."""
    torch.manual_seed(6)
    group, target = dist.group.WORLD, whole()[1].clamp(max=7)
    student, teacher = ((torch.randn(6, 2, 8) * 3).chunk(world, -1)[rank].requires_grad_() for _ in range(2))
    hidden, head, bias = torch.randn(6, 2, 4, requires_grad=True), torch.randn(8, 4), torch.randn(8)
    weight, own_bias = (t.chunk(world)[rank].clone().requires_grad_() for t in (head, bias))
    found = {
        "logprobs": vocab_parallel_logprobs(student, target, group),
        "entropy": vocab_parallel_entropy(student, group),
        "kl": vocab_parallel_kl_div(student, teacher, tp_group=group),
        "reverse": vocab_parallel_kl_div(student, teacher, reverse=True, tp_group=group),
        "linear": vocab_parallel_linear_cross_entropy(hidden, weight, target, own_bias, group, chunk_size=5),
    }
    made = {}
    for name, value in found.items():
        inputs = (hidden, weight, own_bias) if name == "linear" else (student, teacher)
        grads = torch.autograd.grad(
            (value * torch.arange(1.0, value.numel() + 1).view_as(value)).sum(), inputs, allow_unused=True
        )
        made[name] = [value.detach(), *(g for g in grads if g is not None)]
    return made


def test_what_is_asked_of_parts_is_what_whole_logits_say() -> None:
    torch.manual_seed(6)
    target = whole()[1].clamp(max=7)
    student, teacher = ((torch.randn(6, 2, 8) * 3).requires_grad_() for _ in range(2))
    hidden, head, bias = (torch.randn(*shape, requires_grad=True) for shape in ((6, 2, 4), (8, 4), (8,)))
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    chosen = log_p.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    want = {
        "logprobs": torch.where(target == -100, 0.0, chosen),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "kl": F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1),
        "reverse": F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1),
        "linear": F.cross_entropy(F.linear(hidden, head, bias).flatten(0, 1), target.flatten()),
    }
    first, second = run_ranks(2, of_parts)
    for name, value in want.items():
        inputs = (hidden, head, bias) if name == "linear" else (student, teacher)
        weights = torch.arange(1.0, value.numel() + 1).view_as(value)
        grads = torch.autograd.grad((value * weights).sum(), inputs, allow_unused=True, retain_graph=True)
        torch.testing.assert_close(first[name][0], value.detach(), rtol=1e-5, atol=1e-6)
        pairs = zip(first[name][1:], second[name][1:], strict=True)
        for i, (grad, (a, b)) in enumerate(zip((g for g in grads if g is not None), pairs, strict=True)):
            got = a if name == "linear" and i == 0 else torch.cat([a, b], 0 if name == "linear" else -1)
            torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-5)


def misuse(rank: int, world: int) -> list[str]:
    """The words of each refusal."""
    logits, target = whole()
    group, own = dist.group.WORLD, logits.tensor_split(world, dim=-1)[rank]
    told = []
    for part, wanted, given in (
        (own, target, {}),
        (logits[..., 4 * rank : 4 * rank + 4], target.masked_fill(target == 3, 8).clamp(max=8), {}),
        (own, target, {"vocab_start_index": 0}),
        (own, target, {"global_vocab_size": 9}),
        (logits[..., : 9 * (1 - rank)], target, {"vocab_start_index": 9 * rank, "vocab_end_index": 9}),
        (own, target, {"reduction": "sum", "gather_sequence_loss": True}),
    ):
        with pytest.raises(ValueError) as error:
            vocab_parallel_cross_entropy(part, wanted, tp_group=group, **given)
        told.append(str(error.value))
    return told


def test_parts_that_do_not_fit_are_one_error_on_every_rank() -> None:
    first, second = run_ranks(2, misuse)
    assert first == second
    for words, told in zip(
        (
            "explicit vocabulary shard bounds are required for uneven shards: ranks have [5, 4] words",
            "Target is out of range for vocabulary size 8: 8",
            "vocab_start_index and vocab_end_index must be provided together",
            "global_vocab_size requires explicit",
            "rank 1 of the tensor group has an empty vocabulary shard",
            "losses are gathered where reduction",
        ),
        first,
        strict=True,
    ):
        assert words in told


def test_what_it_does_not_know_is_refused() -> None:
    logits, target = whole()
    with pytest.raises(DeepSpeedError, match="reduction='median'"):
        vocab_parallel_cross_entropy(logits, target, reduction="median")
    with pytest.raises(DeepSpeedError, match="backend='triton'"):
        vocab_parallel_cross_entropy(logits, target, backend="triton")
    with pytest.raises(DeepSpeedError, match=r"target is \(3, 2\)"):
        vocab_parallel_cross_entropy(logits, target[:3])
