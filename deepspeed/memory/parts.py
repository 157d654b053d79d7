"""A micro-batch as one rank has it where ranks share its sequences: the longest part, by shapes alone.

Called by the estimator before it traces. A rank computes what treats tokens alone on its part; its attention is over all
tokens with a part of the heads, which takes as much memory as all heads over a part.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from deepspeed.comm.recorder import Current
from deepspeed.parallel.sequence.forward import by_name
from deepspeed.parallel.sequence.hf import can_ring
from deepspeed.parallel.sequence.messages import Attends, Sent, of_attention, of_inputs
from deepspeed.utils.errors import DeepSpeedConfigError


def part_of(batch: Any, num_ranks: int) -> Any:
    """The batch with every tensor of [samples, tokens, ...] cut to ceil(tokens / num_ranks) tokens; shapes count alone.

    Raises DeepSpeedConfigError where no tensor has tokens, or there are fewer than ranks.
    """
    lengths = [t.shape[1] for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim() >= 2]
    length = max(lengths, default=0)
    if length < num_ranks:
        raise DeepSpeedConfigError(
            f"sequence_parallel_size = {num_ranks}: the batch has no sequences of at least as many tokens (the longest: {length})."
        )

    def cut(tensor: Tensor) -> Tensor:
        if tensor.dim() < 2 or tensor.shape[1] != length:
            return tensor
        shape = [tensor.shape[0], -(-length // num_ranks), *tensor.shape[2:]]
        return torch.empty(shape, dtype=tensor.dtype, device="meta", requires_grad=tensor.requires_grad)

    return tree_map_only(Tensor, cut, batch)


class _Exchanged(torch.autograd.Function):
    """In place of exchanges: says what they would send, forward and backward."""

    @staticmethod
    def forward(ctx: Any, there: Sent, back: Sent, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.back = back
        _say(there)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        _say(ctx.back)
        return None, None, *grads


def _say(sent: Sent) -> None:
    if Current.predicted is not None:
        for op, nbytes in sent:
            Current.predicted(op, nbytes)


def attends(query: Tensor, key: Tensor, value: Tensor) -> Attends:
    """An attention of [samples, heads, tokens, width] each."""
    samples, num_query, tokens, width = query.shape
    return Attends(samples, num_query, key.shape[1], tokens, width, value.shape[-1], query.element_size())


def say_inputs(num_ranks: int, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a forward of a rank's part: what ranks tell each other of its inputs. Position ids are taken for given."""
    named = by_name(model, args, kwargs)
    tokens = next((t for t in tree_leaves(named) if isinstance(t, Tensor) and t.dim() >= 2), None)
    if tokens is None:
        return
    positions = named.get("position_ids")
    rows = positions.shape[0] if isinstance(positions, Tensor) and positions.dim() == 3 else 1
    targets = named.get("shift_labels", named.get("labels"))
    rows += sum(
        isinstance(t, Tensor) and t.shape[:2] == tokens.shape[:2] and t.dim() == 2
        for t in (named.get("attention_mask"), targets)
    )
    _say(of_inputs(tokens.shape[0], tokens.shape[1], num_ranks, rows))


class Attention(NamedTuple):
    """One that was seen."""

    at: Attends
    rings: bool
    """Whether a ring computes what it would."""
    has_bias: bool


@contextmanager
def noting_attention(into: list[Attention]) -> Iterator[None]:
    """ "sdpa" of Transformers says meanwhile how it is called."""
    if "transformers" not in sys.modules:
        yield
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def note(*args: Any, **kwargs: Any) -> Any:
        into.append(Attention(attends(*args[1:4]), can_ring("sdpa", kwargs), kwargs.get("position_bias") is not None))
        return attend(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("sdpa", note)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS.register("sdpa", attend)


@contextmanager
def exchanged(num_ranks: int) -> Iterator[None]:
    """ "sdpa" of Transformers keeps meanwhile what it keeps on ranks that share sequences: no mask of [tokens, tokens] and no copies of
    keys for each query head, since it is causal by a flag there; its output and the part of it that came back are two tensors."""
    transformers: Any = sys.modules.get("transformers.masking_utils")
    if num_ranks == 1 or transformers is None:
        yield
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    masks = transformers.ALL_MASK_ATTENTION_FUNCTIONS
    mask, attend = masks["sdpa"], ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend_and_send(*args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        there, back = of_attention(attends(*args[1:4]), num_ranks, can_ring=can_ring("sdpa", kwargs))
        args = (args[0], *_Exchanged.apply(there[:-1], back[-1:], *args[1:4]), *args[4:])
        output, weights = attend(*args, **kwargs)
        return _Exchanged.apply(there[-1:], back[:-1], output)[0].clone(), weights

    masks.register("sdpa", lambda *args, **kwargs: None)
    ALL_ATTENTION_FUNCTIONS.register("sdpa", attend_and_send)
    try:
        yield
    finally:
        masks.register("sdpa", mask)
        ALL_ATTENTION_FUNCTIONS.register("sdpa", attend)
