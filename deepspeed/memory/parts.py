"""A micro-batch as one rank has it where ranks share its sequences: the longest part, by shapes alone.

Called by the estimator before it traces. A rank computes what treats tokens alone on its part; its attention is over all
tokens with a part of the heads, which takes as much memory as all heads over a part.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

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
        output, weights = attend(*args, **kwargs)
        return output.clone(), weights

    masks.register("sdpa", lambda *args, **kwargs: None)
    ALL_ATTENTION_FUNCTIONS.register("sdpa", attend_and_send)
    try:
        yield
    finally:
        masks.register("sdpa", mask)
        ALL_ATTENTION_FUNCTIONS.register("sdpa", attend)
