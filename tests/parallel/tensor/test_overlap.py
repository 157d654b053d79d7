"""With `tp_overlap_comm` a column layer's backward sends before it computes the weight's gradient, and waits after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deepspeed.parallel.tensor.collectives import TensorGroup
from deepspeed.parallel.tensor.layers import ColumnLinear, Part, turn


class Watched(TensorGroup):
    """Two ranks whose sums are only noted."""

    def __init__(self, log: list[str]) -> None:
        super().__init__(None, 0, 2)
        self.log = log

    def start_sum(self, x: Tensor) -> Any:
        self.log.append(f"send {tuple(x.shape)}")
        return self

    def wait(self) -> None:
        self.log.append("arrived")


class Products(TorchDispatchMode):
    """Notes the shapes of products' results."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.log.append(f"multiply {tuple(result.shape)}")
        return result


def backward_of(overlaps: bool) -> list[str]:
    """What a backward of a layer of 3 to 5 features, of which a rank has 5, does for 2 tokens, in order."""
    log: list[str] = []
    layer = nn.Linear(3, 5)
    turn(layer, ColumnLinear, Part(ranks=Watched(log), lengths=(5, 5), overlaps=overlaps))
    out = layer(torch.randn(2, 3, requires_grad=True))
    with Products(log):
        out.sum().backward()
    return log


def test_the_sum_of_the_inputs_gradient_travels_while_the_weights_is_computed() -> None:
    assert backward_of(overlaps=True) == ["multiply (2, 3)", "send (2, 3)", "multiply (5, 3)", "arrived"]


def test_without_it_nothing_is_computed_meanwhile() -> None:
    log = backward_of(overlaps=False)
    assert log[-2:] == ["send (2, 3)", "arrived"] and sorted(log[:2]) == ["multiply (2, 3)", "multiply (5, 3)"]
