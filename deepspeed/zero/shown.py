"""Averaged gradients shown to the script as `param.grad`, between the boundary's backward and the step; and those it assigns.

Owned by the reducer. Plain PyTorch's scripts read `param.grad` there, edit it, put another tensor or None in its place.
Where a bucket's averaged gradients are whole on this rank each parameter is shown its view of them, so that an edit in
place is an edit of what is stepped; whatever else the script did is taken over before the step reads them:

    another tensor    its values are what is stepped
    None              the parameter is left out of the step, on this rank, as every optimizer skips `grad is None`

Gradients that add up in another dtype than the parameter's cannot be `param.grad`: a copy is shown, and the elements that
the script changed in it are taken over. Where ranks have slices nothing is shown; a gradient that the script assigns there,
the same on every rank, is stepped all the same, by each rank its slice.

Invariant: autograd never adds to a view that is shown without the reducer being told (`Reducer._take`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deepspeed.zero.gradients import Gradients
from deepspeed.zero.param import grads_of
from deepspeed.zero.veil import Veil


class _Shown(NamedTuple):
    """One parameter and what it shows of its view: number `number` of bucket number `position`."""

    position: int
    number: int
    gradients: Gradients
    param: nn.Parameter
    view: Tensor
    face: Tensor
    """The view itself, or a copy in the parameter's dtype."""

    def take_edits(self) -> None:
        """Have in the view what the script changed in the copy, without rounding the rest."""
        if self.face is not self.view:
            self.view.copy_(torch.where(self.view.to(self.face.dtype) == self.face, self.view, self.face))


class Assigned(NamedTuple):
    """A gradient that the script gave to parameter number `number` of a bucket that shows nothing."""

    gradients: Gradients
    number: int
    gradient: Tensor

    @property
    def param(self) -> nn.Parameter:
        """Whose it is."""
        return self.gradients.bucket.params[self.number]

    def take(self) -> None:
        """Have this rank's part of it be what is stepped. After the reduction."""
        bucket, values = self.gradients.bucket, self.gradients.values()
        gradient = self.gradient.to_dense() if self.gradient.is_sparse else self.gradient
        if values.numel() == bucket.layout.padded_numel:
            bucket.split(values)[self.number].copy_(gradient)
        else:
            for piece in bucket.layout.pieces(bucket.exchange.rank):
                if piece.param == self.number:
                    part = gradient.reshape(-1).narrow(0, piece.in_param, piece.numel)
                    values.narrow(0, piece.in_shard, piece.numel).copy_(part)
        self.gradients.replace(values)
        self.gradients.arrivals.used.add(self.number)


class ShownGradients:
    """What is shown at the moment."""

    def __init__(self) -> None:
        self._shown: list[_Shown] = []
        self._veil = Veil()

    def __bool__(self) -> bool:
        return bool(self._shown)

    def show(self, buckets: Sequence[Gradients]) -> None:
        """Show what is whole on this rank; what is shown already stays as the script left it."""
        if self._shown:
            return
        for position, gradients in enumerate(buckets):
            pairs = zip(gradients.bucket.params, gradients.shown, strict=False)
            for number, (param, view) in enumerate(pairs):
                param.grad = face = view.to(param.dtype)
                self._shown.append(_Shown(position, number, gradients, param, view, view if face is view else face))

    def veil(self, buckets: Sequence[Gradients]) -> None:
        """These show nothing, until `close`: tell a script that looks."""
        self._veil.lower([gradients.bucket for gradients in buckets])

    def assigned(self, buckets: Sequence[Gradients]) -> list[Assigned]:
        """What the script has assigned to `param.grad` of parameters that are shown nothing."""
        showing = {id(shown.gradients) for shown in self._shown}
        hidden = [gradients for gradients in buckets if id(gradients) not in showing]
        return [
            Assigned(gradients, number, gradient)
            for gradients in hidden
            for number, gradient in enumerate(grads_of(gradients.bucket.params))
            if gradient is not None
        ]

    def adopt(self) -> list[tuple[int, int]]:
        """Take over what the script put in place of views; they stay shown. (bucket, parameter) without a gradient now."""
        missing = []
        for shown in self._shown:
            gradient = shown.param.grad
            if gradient is None:
                shown.view.zero_()  # adds nothing to the norm
                missing.append((shown.position, shown.number))
            elif gradient is shown.face:
                shown.take_edits()
            else:
                shown.view.copy_(gradient)
        return missing

    def hide(self) -> None:
        """Take everything back, before a backward adds to it; a parameter without a gradient had none in this step."""
        self.adopt()
        for shown in self._shown:
            if shown.param.grad is None:
                shown.gradients.arrivals.used.discard(shown.number)
            shown.param.grad = None
        self._shown.clear()

    def close(self) -> None:
        """Take everything back; the step is over."""
        for shown in self._shown:
            shown.param.grad = None
        self._shown.clear()
        self._veil.lift()
