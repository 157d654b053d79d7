"""Parameters with gradients, and optimizers stepped on them, for the tests beside this file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

SHAPES = [(4, 6), (7,), (5, 3), ()]


def tensors(
    shapes: Sequence[tuple[int, ...]] = SHAPES, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def parameters(*args: Any, **kwargs: Any) -> list[nn.Parameter]:
    return [nn.Parameter(tensor) for tensor in tensors(*args, **kwargs)]


def gradients(
    num_steps: int, shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32
) -> list[list[Tensor]]:
    return [tensors(shapes, seed=100 + step, dtype=dtype) for step in range(num_steps)]


def step(optimizer: torch.optim.Optimizer, rows: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The optimizer's parameters after one step per row of gradients."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for row in rows:
        for param, grad in zip(params, row, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    return [param.detach() for param in params]


def after_steps(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], num_steps: int = 4, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """The standard parameters after `num_steps` steps with the standard gradients."""
    return step(make(parameters(dtype=dtype)), gradients(num_steps, dtype=dtype))


def assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor], rtol: float = 1e-5, atol: float = 1e-6) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, check_dtype=False)
