"""Hooks around modules that are no layers: what of their inputs gets gradients from every rank, what of their outputs is summed.

Put there by `apply`, by what a plan says of experts, of routers and of products that stay whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.parallel.tensor.collectives import TensorGroup


def sum_output(ranks: TensorGroup, module: nn.Module, args: Any, output: Any) -> Any:
    """After a module: its output, or the first of several, summed over the ranks."""
    if output is None:
        return None
    if isinstance(output, tuple):
        return (ranks.leave(output[0]), *output[1:])
    return ranks.leave(output)


def enter_experts(ranks: TensorGroup, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Hidden states, and the weights by which experts' outputs are summed, get gradients from every rank."""

    def entered(value: Any) -> Any:
        return ranks.enter(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(entered(value) for value in args), {key: entered(value) for key, value in kwargs.items()}


def divide_input(ranks: TensorGroup, module: nn.Module, args: Any) -> Any:
    """Before an expert that gives its input, on every rank: so that the sum over ranks is the input."""
    return (args[0] / ranks.size, *args[1:])


def enter_tail(ranks: TensorGroup, rope: int, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """After a product that is whole: the rotary part, the last `rope` features, gets gradients from every rank."""
    head, tail = output.split([output.shape[-1] - rope, rope], dim=-1)
    return torch.cat([head, ranks.enter(tail)], dim=-1)
