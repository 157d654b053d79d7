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

Group = Any


class TokenLosses(torch.autograd.Function):
    """-log softmax of each token's target, [...], from logits [..., own vocabulary]; 0 for ignored targets."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, group: Group, first: int, ignored: int) -> Tensor:
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
    """Every rank's part, one after the other along a dimension; backward takes the own part out."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group, dim: int) -> Tensor:
        ctx.rank, ctx.dim, ctx.length = dist.get_rank(group), dim, part.shape[dim]
        num_ranks = dist.get_world_size(group)
        found = part.new_empty(num_ranks * part.numel())
        all_gather_single(found, part.contiguous().view(-1), group=group)
        return torch.cat(list(found.view(num_ranks, *part.shape)), dim=dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return grads[0].narrow(ctx.dim, ctx.rank * ctx.length, ctx.length), None, None


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
    logits: Tensor,
    target: Tensor,
    tp_group: Group = None,
    sp_group: Group = None,
    ignore_index: int = IGNORED,
    reduction: str = "mean",
    backend: str = "torch",
) -> Tensor:
    """Cross entropy of logits [..., vocabulary / ranks of tp_group] and whole-vocabulary targets [...].

    reduction: "mean" over the targets that count, "sum", both over the ranks of sp_group too; or "none", this rank's own
    tokens. backend: "torch" is the only one. Collective over the groups. Raises DeepSpeedError.
    """
    if reduction not in ("mean", "sum", "none"):
        raise DeepSpeedError(f'vocab_parallel_cross_entropy(reduction={reduction!r}): it is "mean", "sum" or "none".')
    if backend != "torch":
        raise DeepSpeedError(f'vocab_parallel_cross_entropy(backend={backend!r}): "torch" is the one there is.')
    if target.shape != logits.shape[:-1]:
        raise DeepSpeedError(
            f"vocab_parallel_cross_entropy: target is {tuple(target.shape)}, logits {tuple(logits.shape)}: they agree in all but the "
            "last dimension."
        )
    losses = TokenLosses.apply(logits, target, tp_group, _first_of(logits, tp_group), ignore_index)
    assert isinstance(losses, Tensor), "one output"
    if reduction == "none":
        return losses
    total, count = losses.sum(), (target != ignore_index).sum()
    if sp_group is not None:
        total = _SumOfRanks.apply(total, sp_group)
        dist.all_reduce(count, group=sp_group)
    return total if reduction == "sum" else total / count.clamp(min=1)


def _first_of(logits: Tensor, group: Group) -> int:
    """The number in the vocabulary of this rank's first logit."""
    if group is None:
        return 0
    sizes = logits.new_empty(dist.get_world_size(group), dtype=torch.long)
    all_gather_single(sizes, sizes.new_tensor([logits.shape[-1]]), group=group)
    return int(sizes[: dist.get_rank(group)].sum())


def vocab_sequence_parallel_cross_entropy(
    vocab_seq_parallel_logits: Tensor, target: Tensor, sp_group: Group, ignore_index: int = IGNORED
) -> Tensor:
    """The losses of all tokens, [s, b], on every rank, from this rank's logits [s/P, b, vocabulary] and targets [s/P, b].

    Backward is of this rank's tokens alone. Collective over the group.
    """
    losses = TokenLosses.apply(vocab_seq_parallel_logits, target, None, 0, ignore_index)
    joined = _JoinedSequence.apply(losses, sp_group, 0)
    assert isinstance(joined, Tensor), "one output"
    return joined
