"""Averaged gradients shown to the script as `param.grad`, between the boundary's backward and the step.

Owned by the reducer. Plain PyTorch's scripts read `param.grad` there, edit it, put another tensor or None in its place.
Where a bucket's averaged gradients are whole on this rank each parameter is shown its view of them, so that an edit in
place is an edit of what is stepped; whatever else the script did is taken over before the step reads them:

    another tensor    its values are what is stepped
    None              the parameter is left out of the step, on this rank, as every optimizer skips `grad is None`

Invariant: autograd never adds to a view that is shown without the reducer being told (`Reducer._take`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from deepspeed.zero.gradients import Gradients


class _Shown(NamedTuple):
    """One parameter and the view that it shows: number `number` of bucket number `position`."""

    position: int
    number: int
    gradients: Gradients
    param: nn.Parameter
    view: Tensor


class ShownGradients:
    """What is shown at the moment."""

    def __init__(self) -> None:
        self._shown: list[_Shown] = []

    def __bool__(self) -> bool:
        return bool(self._shown)

    def show(self, buckets: Sequence[Gradients]) -> None:
        """Show what is whole on this rank; what is shown already stays as the script left it."""
        if self._shown:
            return
        for position, gradients in enumerate(buckets):
            pairs = zip(gradients.bucket.params, gradients.shown, strict=False)
            for number, (param, view) in enumerate(pairs):
                param.grad = view
                self._shown.append(_Shown(position, number, gradients, param, view))

    def adopt(self) -> list[tuple[int, int]]:
        """Take over what the script put in place of views; they stay shown. (bucket, parameter) without a gradient now."""
        missing = []
        for position, number, _, param, view in self._shown:
            gradient = param.grad
            if gradient is None:
                view.zero_()  # adds nothing to the norm
                missing.append((position, number))
            elif gradient is not view:
                view.copy_(gradient)
        return missing

    def hide(self) -> None:
        """Take everything back, before a backward adds to it; a parameter without a gradient had none in this step."""
        self.adopt()
        for _, number, gradients, param, _ in self._shown:
            if param.grad is None:
                gradients.arrivals.used.discard(number)
            param.grad = None
        self._shown.clear()

    def close(self) -> None:
        """Take everything back; the step is over."""
        for shown in self._shown:
            shown.param.grad = None
        self._shown.clear()
