"""What happens around every backward pass: the loss scale is checked, and stage 0 shows averaged gradients.

Attached by `engine.build` to the watch on backward passes (`zero.hooks.BackwardWatch`), which tells of those that begin
with a plain `loss.backward()` too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from deepspeed.engine.accumulation import Accumulation
from deepspeed.precision import StaticLossScale
from deepspeed.utils.errors import TrainingStateError
from deepspeed.zero.hooks import BackwardWatch
from deepspeed.zero.reduce import Reducer


class LossScaleGuard:
    """Notices a plain `loss.backward()` where the loss has to be scaled first."""

    def __init__(self, scale: StaticLossScale, params: Callable[[], Iterable[nn.Parameter]]) -> None:
        self.scale, self.params = scale, params
        self.is_scaled = False
        self.on_plain: list[Callable[[], None]] = []
        """Told of a backward whose loss the engine has not seen."""

    def attach(self, watch: BackwardWatch) -> None:
        """Be the first that hears of backward passes, before the hooks gather. Where there is nothing to notice nobody calls this."""
        if self.check not in watch.on_begin:
            watch.on_begin.insert(0, self.check)
            watch.on_end.insert(0, self.reset)

    def check(self) -> None:
        """Called as a backward begins. Raises TrainingStateError for an unscaled loss."""
        if not self.is_scaled and self.scale.is_used and self._accumulates():
            raise TrainingStateError(
                f"loss.backward() on an unscaled loss: fp16 needs it multiplied by the loss scale ({self.scale.scale:g}).\n"
                "  Use engine.backward(loss), or engine.scale(loss).backward()."
            )
        for listener in () if self.is_scaled else self.on_plain:
            listener()

    def _accumulates(self) -> bool:
        """Whether the backward that runs gives gradients to parameters; `torch.autograd.grad` of inputs, or of parameters, does not."""
        for param in self.params():
            if param.requires_grad:
                try:
                    if torch._C._will_engine_execute_node(get_gradient_edge(param).node):
                        return True
                except RuntimeError:  # torch's for a parameter whose gradient autograd.grad returns
                    continue
        return False

    def note_scaled(self) -> None:
        """The backward that begins next is of a scaled loss."""
        self.is_scaled = True

    def reset(self) -> None:
        """Called as a backward ends."""
        self.is_scaled = False


def expose(reducer: Reducer, accumulation: Accumulation, always: bool = False) -> None:
    """Stage 0, or one rank: show averaged gradients as `param.grad` after the boundary's backward, as plain PyTorch does."""
    if (always or accumulation.should_reduce()) and reducer.saw_backward:
        reducer.finish()
        reducer.expose()
