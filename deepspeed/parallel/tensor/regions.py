"""Sequence-parallel regions: between a block's products each rank has the hidden states of some tokens only.

Made by `apply` where `sequence_parallel_regions` is true. Norms, dropout, residual sums and biases of rows, which every rank
would compute alike, are computed once each, and their activations are 1/t.

    embeddings | first block:  own tokens | norm | gather | q k v ... o  scatter | + | norm | gather | gate up ... down  scatter | + |
    ... after the last block: all tokens | norm | head

    gather    forward: all ranks' tokens          backward: gradients are summed, the own tokens' kept
    scatter   forward: parts are summed, ...      backward: all ranks' tokens
    open      forward: the own tokens             backward: all ranks' tokens
    close     forward: all ranks' tokens          backward: the own tokens

As many bytes travel as without: what was one sum is a sum of which each rank gets its tokens, and a gathering of those.

Invariant: in evaluation nothing is divided, so that generation with a cache is as it was; a module's mode says which, also where
its forward runs again for a checkpoint. Parameters that see the own tokens only have gradients that are summed over the ranks.
After Korthikanti et al. (arXiv:2205.05198), sec. 4.2.2; products keep their gathered inputs, theirs gather again in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.parallel.tensor.collectives import TensorGroup
from deepspeed.utils.errors import DeepSpeedError

_TOKENS = 1
"""The dim of tokens in hidden states, [batch, tokens, width]."""

_Way = Callable[[Tensor, TensorGroup], Tensor]


class Region:
    """The blocks of one list, and the modules in them that see whole sequences."""

    def __init__(self, ranks: TensorGroup, block: nn.Module) -> None:
        self.ranks, self._block = ranks, block

    def __deepcopy__(self, memo: Any) -> Region:
        return self

    @property
    def is_open(self) -> bool:
        """Whether hidden states between products are of the own tokens."""
        return self._block.training

    def open(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Before the first block. Raises DeepSpeedError where ranks do not divide the tokens."""
        return _changed(args, kwargs, self._own) if self.is_open else (args, kwargs)

    def close(self, module: nn.Module, args: Any, output: Any) -> Any:
        """After the last block."""
        if not self.is_open:
            return output
        self.ranks.forget()
        hidden = output[0] if isinstance(output, tuple) else output
        whole = _Move.apply(hidden, self.ranks, _CLOSE)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    def gather(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Before a module whose products see whole sequences."""
        return _changed(args, kwargs, lambda x: _Move.apply(x, self.ranks, _GATHER)) if self.is_open else (args, kwargs)

    def scatter(self, x: Tensor) -> Tensor:
        """The own tokens of the sum of all ranks' `x`."""
        self.ranks.forget()
        own: Tensor = _Move.apply(x, self.ranks, _SCATTER)
        return own

    def _own(self, hidden: Tensor) -> Tensor:
        tokens = hidden.shape[_TOKENS] if hidden.dim() == 3 else 0
        if not tokens or tokens % self.ranks.size:
            raise DeepSpeedError(
                f"tensor_parallel.sequence_parallel_regions: hidden states are {tuple(hidden.shape)}, and {self.ranks.size} ranks do "
                "not divide their tokens.\n  Pad batches to a multiple (pad_to_multiple_of), or leave the key out."
            )
        opened: Tensor = _Move.apply(hidden, self.ranks, _OPEN)
        return opened


def _changed(args: Any, kwargs: Any, change: Any) -> tuple[Any, Any]:
    """With the hidden states, which are the first argument or called so, changed."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}


def _own(x: Tensor, ranks: TensorGroup) -> Tensor:
    return x.chunk(ranks.size, dim=_TOKENS)[ranks.rank].contiguous()


def _all(x: Tensor, ranks: TensorGroup) -> Tensor:
    return ranks.all_parts(x, _TOKENS)


def _summed(x: Tensor, ranks: TensorGroup) -> Tensor:
    return ranks.summed_part(x, _TOKENS)


_OPEN, _CLOSE, _GATHER, _SCATTER = (_own, _all), (_all, _own), (_all, _summed), (_summed, _all)
"""What happens to tokens in the forward, and to their gradients in the backward."""


class _Move(torch.autograd.Function):
    """One of these pairs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: TensorGroup, pair: tuple[_Way, _Way]) -> Tensor:
        ctx.ranks, ctx.back = ranks, pair[1]
        return pair[0](x, ranks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grads[0], ctx.ranks), None, None
