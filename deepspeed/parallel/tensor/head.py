"""A head whose logits stay cut over the vocabulary, and the loss of a causal model from them: logits are never whole.

Asked by `apply` where `vocab_parallel_lm_head` is true. Each rank multiplies its rows of the head; the loss joins the parts by two
all-reduces of one number per token (`sequence.cross_entropy`). An embedding that is tied to the head is cut in the same way.

    logits [.., V/t]  ->  largest (max over ranks)  ->  sum of exponentials, the target's logit (sums over ranks)  ->  loss

Invariant: the loss and every gradient are those of whole logits, for Transformers' `ForCausalLMLoss`; others are refused.
Formulas: Megatron-LM (arXiv:1909.08053), sec. 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspeed.parallel.sequence.cross_entropy import TokenLosses, check_targets
from deepspeed.parallel.tensor.collectives import TensorGroup
from deepspeed.utils.errors import DeepSpeedConfigError

ORIGINAL = "_deepspeed_original_loss_function"
"""The contract's attribute of a model whose loss was replaced."""
_KEY = "tensor_parallel.vocab_parallel_lm_head"


def find_head(model: nn.Module) -> tuple[nn.Module, str, str | None]:
    """The module that has a loss and a head; the head's name, and the embedding's that is tied to it.

    Raises DeepSpeedConfigError (a ValueError) for a model without a head, or with another loss than a causal model's.
    """
    names = {id(module): name for name, module in model.named_modules()}
    for owner in model.modules():
        getter = getattr(type(owner), "get_output_embeddings", None)
        head = owner.get_output_embeddings() if getter is not None else None  # type: ignore[operator]
        if isinstance(head, nn.Module) and id(head) in names:
            _check_loss(owner)
            table = owner.get_input_embeddings()  # type: ignore[operator]
            is_tied = isinstance(table, nn.Module) and getattr(table, "weight", None) is head.weight
            return owner, names[id(head)], names.get(id(table)) if is_tied else None
    raise DeepSpeedConfigError(
        f"{_KEY} = true, but {type(model).__name__} has no head that get_output_embeddings() gives.\n  Leave the key out."
    )


def _check_loss(owner: Any) -> None:
    kind = getattr(owner, "loss_type", None)
    is_writable = isinstance(getattr(type(owner), "loss_function", None), property) or "loss_function" in owner.__dict__
    if not is_writable or kind not in (None, "ForCausalLM"):
        what = f"computes {kind}" if is_writable else "has no loss_function that can be replaced"
        raise DeepSpeedConfigError(
            f"{_KEY} = true, but {type(owner).__name__} {what}: the loss of cut logits is a causal model's.\n  Leave the key out."
        )


class VocabParallelCausalLMLoss:
    """Transformers' `ForCausalLMLoss`, from this rank's part of the logits, [batch, length, V/t]."""

    def __init__(self, ranks: TensorGroup, lengths: tuple[int, ...]) -> None:
        self.ranks, self.lengths = ranks, lengths

    def __deepcopy__(self, memo: Mapping[int, Any]) -> VocabParallelCausalLMLoss:
        return self

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The mean over counted tokens, or their sum over `num_items_in_batch`. Collective over the tensor group.

        Raises ValueError for logits that are not this rank's part, and targets outside of the vocabulary.
        """
        own = self.lengths[self.ranks.rank]
        if logits.shape[-1] != own:
            raise ValueError(f"logits are {tuple(logits.shape)}, and this rank has {own} of {vocab_size} words.")
        if shift_labels is None:
            assert labels is not None, "Transformers calls a loss with labels, or with labels that are shifted"
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = shift_labels.reshape(-1).to(logits.device)
        check_targets(targets, torch.Size((targets.numel(), own)), sum(self.lengths), ignore_index)
        self.ranks.forget()
        first, group = sum(self.lengths[: self.ranks.rank]), self.ranks.group
        losses = TokenLosses.apply(logits.reshape(-1, own), targets, group, first, ignore_index)
        assert isinstance(losses, Tensor), "one output"
        num_tokens = targets.numel() * 4
        self.ranks.count(2 * num_tokens)
        self.ranks.count(2 * 2 * num_tokens)
        if num_items_in_batch is None:
            return losses.sum() / (targets != ignore_index).sum()
        if torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(losses.device)
        return losses.sum() / num_items_in_batch


def replace_loss(owner: Any, ranks: TensorGroup, lengths: tuple[int, ...]) -> None:
    """Have a model compute its loss from cut logits; its own is kept as `_deepspeed_original_loss_function`."""
    owner.__dict__[ORIGINAL] = owner.loss_function
    owner.loss_function = VocabParallelCausalLMLoss(ranks, lengths)
