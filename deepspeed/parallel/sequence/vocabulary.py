"""What scripts ask of logits whose vocabulary is in parts, without whole logits: `vocab_parallel_ops`, `linear_cross_entropy`.

Probabilities are a rank's own part; of each token two numbers travel (the largest logit, the sum of exponentials), and one more for
each sum over the vocabulary. `vocab_parallel_linear_cross_entropy` has logits for one chunk of tokens only, and makes them again
in the backward.

Invariant: values and gradients are those of torch's functions on whole logits, in fp32.
Names and arguments are the public contract of the original.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from deepspeed.parallel.sequence.cross_entropy import (
    TokenLosses,
    check_choices,
    check_targets,
    own_words,
    reduced,
)
from deepspeed.parallel.sequence.inputs import IGNORED
from deepspeed.utils.errors import DeepSpeedError

Group = Any
CHUNK = 1024
"""Tokens whose logits exist at once, where nobody says."""


def vocab_parallel_logprobs(
    vocab_parallel_logits: Tensor,
    index: Tensor,
    tp_group: Group = None,
    vocab_start_index: int | None = None,
    vocab_end_index: int | None = None,
    global_vocab_size: int | None = None,
    ignore_index: int = IGNORED,
) -> Tensor:
    """log softmax at `index` [...], fp32, from logits [..., this rank's words]; 0 where the index is ignored.

    Collective over the group. Raises DeepSpeedError (a ValueError) as `vocab_parallel_cross_entropy` does.
    """
    words = own_words(vocab_parallel_logits, tp_group, vocab_start_index, vocab_end_index, global_vocab_size)
    first, total = words
    check_targets(index, vocab_parallel_logits.shape, total, ignore_index)
    losses = TokenLosses.apply(vocab_parallel_logits[..., : total - first], index, tp_group, first, ignore_index)
    assert isinstance(losses, Tensor), "one output"
    return -losses


def vocab_parallel_entropy(vocab_parallel_logits: Tensor, tp_group: Group = None) -> Tensor:
    """The entropy of each token's distribution, [...], fp32, from logits [..., this rank's words]. Collective over the group."""
    log_p = _log_softmax(vocab_parallel_logits, tp_group)
    return _sum_over(-(log_p.exp() * log_p).sum(-1), tp_group)


def vocab_parallel_kl_div(
    student_logits: Tensor, teacher_logits: Tensor, reverse: bool = False, tp_group: Group = None
) -> Tensor:
    """KL(teacher || student) of each token, [...], fp32, with `reverse` KL(student || teacher), from logits [..., this rank's words].

    Both get gradients; detach a teacher that is not trained. Collective over the group. Raises DeepSpeedError (a ValueError).
    """
    if student_logits.shape != teacher_logits.shape:
        raise DeepSpeedError(
            f"vocab_parallel_kl_div: the student's logits are {tuple(student_logits.shape)}, the teacher's {tuple(teacher_logits.shape)}."
        )
    student, teacher = _log_softmax(student_logits, tp_group), _log_softmax(teacher_logits, tp_group)
    of, other = (student, teacher) if reverse else (teacher, student)
    return _sum_over((of.exp() * (of - other)).sum(-1), tp_group)


def _log_softmax(logits: Tensor, group: Group) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = wide.detach().amax(dim=-1, keepdim=True)
    if group is not None:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    shifted = wide - largest
    return shifted - _Normalizer.apply(shifted.exp().sum(-1, keepdim=True), group).log()


class _Normalizer(torch.autograd.Function):
    """A sum over ranks that each rank's part of the output depends on: backward sums, too."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _summed(value, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return _summed(grads[0], ctx.group), None


class _Total(torch.autograd.Function):
    """A sum over ranks that is equal on all of them: backward hands its gradient on."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Group) -> Tensor:
        return _summed(value, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return grads[0], None


def _sum_over(value: Tensor, group: Group) -> Tensor:
    found = _Total.apply(value, group)
    assert isinstance(found, Tensor), "one output"
    return found


def _summed(value: Tensor, group: Group) -> Tensor:
    total = value.contiguous().clone()
    if group is not None:
        dist.all_reduce(total, group=group)
    return total


def vocab_parallel_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    tp_group: Group = None,
    sp_group: Group = None,
    vocab_start_index: int | None = None,
    vocab_end_index: int | None = None,
    ignore_index: int = IGNORED,
    reduction: str = "mean",
    chunk_size: int | None = None,
) -> Tensor:
    """Cross entropy, fp32, of a linear head whose rows are in parts, from what enters it.

    hidden: [..., width], equal on the ranks of tp_group, which get its whole gradient; weight: [this rank's words, width]; target: [...].
    reduction: over the targets that count, and the ranks of sp_group. chunk_size: tokens whose logits exist at once.
    Collective over the groups. Raises DeepSpeedError (a ValueError).
    """
    check_choices("vocab_parallel_linear_cross_entropy", reduction, gathers=False)
    if chunk_size is not None and chunk_size < 1:
        raise DeepSpeedError(
            f"vocab_parallel_linear_cross_entropy(chunk_size={chunk_size}): it is a positive number of tokens."
        )
    first, total = own_words(weight.t(), tp_group, vocab_start_index, vocab_end_index)
    check_targets(target, torch.Size((*hidden.shape[:-1], total)), total, ignore_index)
    rows = min(len(weight), total - first)
    losses = _LinearLosses.apply(
        hidden.flatten(0, -2),
        weight[:rows],
        None if bias is None else bias[:rows],
        target.flatten(),
        tp_group,
        first,
        ignore_index,
        chunk_size or CHUNK,
    )
    assert isinstance(losses, Tensor), "one output"
    return reduced(losses.view(target.shape), target, sp_group, ignore_index, reduction)


class _LinearLosses(torch.autograd.Function):
    """Tokens' losses, [n], of hidden [n, width]; logits are made twice and kept never."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        group: Group,
        first: int,
        ignored: int,
        chunk: int,
    ) -> Tensor:
        ctx.group, ctx.first, ctx.ignored, ctx.chunk = group, first, ignored, chunk
        losses = [
            TokenLosses.apply(F.linear(own, weight, bias), wanted, group, first, ignored)
            for own, wanted in zip(hidden.split(chunk), target.split(chunk), strict=True)
        ]
        ctx.save_for_backward(hidden, weight, bias, target)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, target = ctx.saved_tensors
        leaves = [t.detach().requires_grad_() for t in (weight, bias) if t is not None]
        made = []
        for own, wanted, grad in zip(
            hidden.split(ctx.chunk), target.split(ctx.chunk), grads[0].split(ctx.chunk), strict=True
        ):
            x = own.detach().requires_grad_()
            with torch.enable_grad():
                losses = TokenLosses.apply(F.linear(x, *leaves), wanted, ctx.group, ctx.first, ctx.ignored)
            torch.autograd.backward([losses], [grad])
            made.append(x.grad)
        whole = torch.cat([grad for grad in made if grad is not None])
        if ctx.group is not None:
            dist.all_reduce(whole, group=ctx.group)
        return whole, leaves[0].grad, leaves[1].grad if bias is not None else None, *[None] * 5
