"""Cross entropy of logits whose vocabulary, or whose sequence, is in parts: `deepspeed.sequence.cross_entropy`.

For scripts that bring their own groups, as Megatron-LM's do. The vocabulary's parts are joined by two all-reduces of one number
per token, the largest logit and the sum of exponentials; the logits stay where they are. The sequence's parts are joined
after the loss. Backward computes this rank's part alone, without a collective: the loss is then equal on all ranks of a
sequence while each has its own tokens' gradients, which the engine takes for "summed" (`loss.py`).

Formulas: Megatron-LM (arXiv:1909.08053), section 3. Names and arguments are the public contract of the original.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.comm.collective import all_gather_single
from deepspeed.parallel.sequence.inputs import IGNORED
from deepspeed.utils.errors import DeepSpeedError
from deepspeed.utils.values import has_values

Group = Any


class TokenLosses(torch.autograd.Function):
    """-log softmax of each token's target, [...], from logits [..., own vocabulary]; 0 for ignored targets."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, group: Group, first: int, ignored: int) -> Tensor:
        """target: [...] of int64, over the whole vocabulary; `first` is where the own part of it begins. fp32, or what is wider."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        largest = wide.amax(dim=-1)
        if group is not None:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        exps = torch.exp(wide - largest[..., None])
        here = (target >= first) & (target < first + logits.shape[-1]) & (target != ignored)
        index = torch.where(here, target - first, 0)
        chosen = torch.where(here, wide.gather(-1, index[..., None])[..., 0] - largest, 0.0)
        both = torch.stack([exps.sum(-1), chosen])
        if group is not None:
            dist.all_reduce(both, group=group)
        exps /= both[0][..., None]
        counts = target != ignored
        ctx.save_for_backward(exps, index, here, counts)
        ctx.dtype = logits.dtype
        return torch.where(counts, torch.log(both[0]) - both[1], 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        softmax, index, here, counts = ctx.saved_tensors
        grad = softmax.clone()
        grad.scatter_add_(-1, index[..., None], -here.to(grad.dtype)[..., None])
        grad *= (grads[0] * counts)[..., None]
        return grad.to(ctx.dtype), None, None, None, None


class _JoinedSequence(torch.autograd.Function):
    """Every rank's part, one after the other along a dimension; backward takes the own part out, with `sums` of all ranks' sum."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group, dim: int, sums: bool) -> Tensor:
        ctx.rank, ctx.dim, ctx.length = dist.get_rank(group), dim, part.shape[dim]
        ctx.group, ctx.sums = group, sums
        num_ranks = dist.get_world_size(group)
        found = part.new_empty(num_ranks * part.numel())
        all_gather_single(found, part.contiguous().view(-1), group=group)
        return torch.cat(list(found.view(num_ranks, *part.shape)), dim=dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grad = grads[0]
        if ctx.sums:
            grad = grad.contiguous().clone()
            dist.all_reduce(grad, group=ctx.group)
        return grad.narrow(ctx.dim, ctx.rank * ctx.length, ctx.length), None, None, None


class _SumOfRanks(torch.autograd.Function):
    """The sum over ranks; backward is each rank's own part of it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Group) -> Tensor:
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return grads[0], None


def vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    tp_group: Group = None,
    sp_group: Group = None,
    vocab_start_index: int | None = None,
    vocab_end_index: int | None = None,
    global_vocab_size: int | None = None,
    ignore_index: int = IGNORED,
    reduction: str = "mean",
    gather_sequence_loss: bool = False,
    backend: str = "torch",
) -> Tensor:
    """Cross entropy, fp32, of logits [..., this rank's words] and whole-vocabulary targets [...].

    vocab_start_index, vocab_end_index, global_vocab_size: this rank's words, where ranks' numbers of them differ or padding is
    behind the last. reduction: "mean" over the targets that count, "sum", both over the ranks of sp_group too; or "none", this rank's
    own tokens, with `gather_sequence_loss` those of all ranks of sp_group along the first dimension, of whose gradients each
    token's rank gets the sum. backend: "torch" is the only one. Collective over the groups. Raises DeepSpeedError (a ValueError).
    """
    check_choices("vocab_parallel_cross_entropy", reduction, gather_sequence_loss, backend)
    words = own_words(vocab_parallel_logits, tp_group, vocab_start_index, vocab_end_index, global_vocab_size)
    losses = _token_losses(vocab_parallel_logits, target, tp_group, words, ignore_index)
    if gather_sequence_loss:
        return _joined(losses, sp_group, sums=True)
    return reduced(losses, target, sp_group, ignore_index, reduction)


def vocab_sequence_parallel_cross_entropy(
    vocab_seq_parallel_logits: Tensor,
    target: Tensor,
    sp_group: Group,
    tp_group: Group = None,
    vocab_start_index: int | None = None,
    vocab_end_index: int | None = None,
    ignore_index: int = IGNORED,
    reduction: str = "none",
    gather_sequence_loss: bool | None = None,
    backend: str = "torch",
) -> Tensor:
    """The losses of all tokens, [s, b], on every rank, from this rank's logits [s/P, b, words] and targets [s/P, b].

    Backward is of this rank's tokens alone. The other arguments are those of `vocab_parallel_cross_entropy`; losses are gathered where
    they are not reduced, unless `gather_sequence_loss` is False. Collective over the groups. Raises DeepSpeedError (a ValueError).
    """
    gathers = reduction == "none" if gather_sequence_loss is None else gather_sequence_loss
    check_choices("vocab_sequence_parallel_cross_entropy", reduction, gathers, backend)
    words = own_words(vocab_seq_parallel_logits, tp_group, vocab_start_index, vocab_end_index, None)
    losses = _token_losses(vocab_seq_parallel_logits, target, tp_group, words, ignore_index)
    if gathers:
        return _joined(losses, sp_group, sums=False)
    return reduced(losses, target, sp_group, ignore_index, reduction)


def check_choices(name: str, reduction: str, gathers: bool, backend: str = "torch") -> None:
    """Raise DeepSpeedError for words that nobody knows, and those that contradict each other."""
    if reduction not in ("mean", "sum", "none"):
        raise DeepSpeedError(f'{name}(reduction={reduction!r}): it is "mean", "sum" or "none".')
    if backend != "torch":
        raise DeepSpeedError(f'{name}(backend={backend!r}): "torch" is the one there is.')
    if gathers and reduction != "none":
        raise DeepSpeedError(
            f'{name}(gather_sequence_loss=True, reduction={reduction!r}): losses are gathered where reduction is "none".'
        )


def own_words(
    logits: Tensor, group: Group, start: int | None, stop: int | None, total: int | None = None
) -> tuple[int, int]:
    """The number in the vocabulary of this rank's first word, and how many words there are.

    logits: [..., this rank's words]. Collective over the group. Raises DeepSpeedError on all its ranks.
    """
    if (start is None) != (stop is None):
        raise DeepSpeedError("vocab_start_index and vocab_end_index must be provided together.")
    if total is not None and start is None:
        raise DeepSpeedError("global_vocab_size requires explicit vocab_start_index and vocab_end_index.")
    own = logits.shape[-1]
    mine = logits.new_tensor([own, -1 if start is None else start, -1 if stop is None else stop], dtype=torch.long)
    found = mine if group is None else mine.new_empty(3 * dist.get_world_size(group))
    if group is not None:
        all_gather_single(found, mine, group=group)
    everyone: list[tuple[int, int, int]] = [(a, b, c) for a, b, c in found.view(-1, 3).tolist()]
    for rank, (size, low, high) in enumerate(everyone):
        if size == 0:
            raise DeepSpeedError(
                f"rank {rank} of the tensor group has an empty vocabulary shard: fewer words than ranks."
            )
        if low >= 0 and not 0 < high - low <= size:
            raise DeepSpeedError(
                f"rank {rank} of the tensor group says its words are {low} to {high}, and has logits of {size}."
            )
    if start is None and len({size for size, *_ in everyone}) > 1:
        raise DeepSpeedError(
            f"explicit vocabulary shard bounds are required for uneven shards: ranks have {[size for size, *_ in everyone]} words.\n"
            "  Give vocab_start_index and vocab_end_index."
        )
    if start is None:
        rank = 0 if group is None else dist.get_rank(group)
        return rank * own, own * len(everyone)
    return start, max(high for *_, high in everyone) if total is None else total


def check_targets(target: Tensor, shape: torch.Size, total: int, ignored: int) -> None:
    """Raise DeepSpeedError for targets of another shape than the logits' `shape[:-1]`, or outside of the vocabulary."""
    if target.shape != shape[:-1]:
        raise DeepSpeedError(
            f"target is {tuple(target.shape)}, logits {tuple(shape)}: they agree in all but the last dimension."
        )
    if not has_values(target):
        return
    is_outside = ((target < 0) | (target >= total)) & (target != ignored)
    if target.device.type != "cpu":  # the host does not wait
        torch._assert_async(~is_outside.any())
    elif bool(is_outside.any()):
        raise DeepSpeedError(
            f"Target is out of range for vocabulary size {total}: {int(target[is_outside].flatten()[0])}.\n"
            f"  Targets that do not count are {ignored} (ignore_index)."
        )


def _token_losses(logits: Tensor, target: Tensor, group: Group, words: tuple[int, int], ignored: int) -> Tensor:
    first, total = words
    check_targets(target, logits.shape, total, ignored)
    losses = TokenLosses.apply(logits[..., : total - first], target, group, first, ignored)
    assert isinstance(losses, Tensor), "one output"
    return losses


def _joined(losses: Tensor, group: Group, *, sums: bool) -> Tensor:
    if group is None:
        return losses
    joined = _JoinedSequence.apply(losses, group, 0, sums)
    assert isinstance(joined, Tensor), "one output"
    return joined


def reduced(losses: Tensor, target: Tensor, group: Group, ignored: int, reduction: str) -> Tensor:
    """Tokens' losses as they are, their sum, or their mean over the targets that count, both over the ranks of `group` too."""
    if reduction == "none":
        return losses
    total, count = losses.sum(), (target != ignored).sum()
    if group is not None:
        total = _SumOfRanks.apply(total, group)
        dist.all_reduce(count, group=group)
    return total if reduction == "sum" else total / count.clamp(min=1)
