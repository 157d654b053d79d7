"""Cross entropy of logits in parts equals torch's of whole ones: losses and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from deepspeed.sequence.cross_entropy import vocab_parallel_cross_entropy, vocab_sequence_parallel_cross_entropy
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
    by_vocabulary = vocab_parallel_cross_entropy(vocabulary, target, tp_group=group)
    by_vocabulary.backward()
    part, labels = logits.tensor_split(world)[rank].clone().requires_grad_(), target.tensor_split(world)[rank]
    by_sequence = vocab_parallel_cross_entropy(part, labels, sp_group=group)
    by_sequence.backward()
    own = part.detach().clone().requires_grad_()
    tokens = vocab_sequence_parallel_cross_entropy(own, labels, group)
    (tokens.sum() / (target != -100).sum()).backward()
    return {
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
    for name, dim, value in (("vocabulary", 2, loss), ("sequence", 0, loss), ("tokens", 0, tokens)):
        for own in found:
            torch.testing.assert_close(own[name][0], value.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(torch.cat([own[name][1] for own in found], dim), logits.grad, rtol=1e-5, atol=1e-7)


def test_what_it_does_not_know_is_refused() -> None:
    logits, target = whole()
    with pytest.raises(DeepSpeedError, match="reduction='median'"):
        vocab_parallel_cross_entropy(logits, target, reduction="median")
    with pytest.raises(DeepSpeedError, match="backend='triton'"):
        vocab_parallel_cross_entropy(logits, target, backend="triton")
    with pytest.raises(DeepSpeedError, match=r"target is \(3, 2\)"):
        vocab_parallel_cross_entropy(logits, target[:3])
