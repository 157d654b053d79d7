"""Averaged gradients shown to the script as `param.grad`, between the boundary's backward and the step; and those it assigns.

Owned by the reducer. Plain PyTorch's scripts read `param.grad` there, edit it, put another tensor or None in its place.
Where a bucket's averaged gradients are whole on this rank each parameter is shown its view of them, so that an edit in
place is an edit of what is stepped; whatever else the script did is taken over before the step reads them:

    another tensor    its values are what is stepped
    None              the parameter is left out of the step, on this rank, as every optimizer skips `grad is None`

Gradients that add up in another dtype than the parameter's cannot be `param.grad`: a copy is shown, and the elements that
the script changed in it are taken over. Where ranks have slices nothing is shown; a gradient that the script assigns there,
the same on every rank, is stepped all the same, by each rank its slice.

Invariant: autograd never adds to a view that is shown without the reducer being told (`Reducer.take`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deepspeed.kernels.native_watch import watch
from deepspeed.zero.gradients import Gradients
from deepspeed.zero.param import give_grads, grads_of
from deepspeed.zero.veil import Veil


class _Shown(NamedTuple):
    """One bucket, number `position`, and what its parameters show of it."""

    position: int
    gradients: Gradients
    params: list[nn.Parameter]
    views: Sequence[Tensor]
    faces: list[Tensor]
    """The views themselves, or copies in the parameters' dtype."""

    @property
    def is_untouched(self) -> bool:
        """Whether nothing was assigned to any of the parameters, and what was written was written to the views."""
        return all(map(is_, grads_of(self.params), self.views))

    def take_edits(self, number: int) -> None:
        """Have in a view what the script changed in the copy of it, without rounding the rest."""
        view, face = self.views[number], self.faces[number]
        if face is not view:
            view.copy_(torch.where(view.to(face.dtype) == face, view, face))


def _home(tensor: Tensor) -> int | None:
    """Where the memory lies that a dense tensor is a view of."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else None


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
        self.shows_any = False
        """Asked for every gradient that arrives."""
        self._shown: list[_Shown] = []
        self._num_watched, self._watch = 0, watch([])
        self.veil = Veil()
        """For buckets that show nothing, until `close`."""

    def show(self, buckets: Sequence[Gradients]) -> None:
        """Show what is whole on this rank; what is shown already stays as the script left it."""
        if self.shows_any:
            return
        for position, gradients in enumerate(buckets):
            params, views = gradients.bucket.params, gradients.shown
            if views:
                views = views[: len(params)]
                is_alike = gradients.bucket.full.dtype is gradients.dtype
                faces = list(views) if is_alike else [v.to(p.dtype) for p, v in zip(params, views, strict=True)]
                give_grads(params, faces)
                self._shown.append(_Shown(position, gradients, list(params), views, faces))
        self.shows_any = bool(self._shown)

    def assigned(self, buckets: Sequence[Gradients]) -> list[Assigned]:
        """What the script has assigned to `param.grad` of parameters that are shown nothing."""
        if not self._shown and self._have_none(buckets):
            return []
        showing = {id(shown.gradients) for shown in self._shown}
        hidden = [(own, grads_of(own.bucket.params)) for own in buckets if id(own) not in showing]
        return [
            Assigned(own, number, gradient)
            for own, found in hidden
            if found.count(None) < len(found)
            for number, gradient in enumerate(found)
            if gradient is not None
        ]

    def _have_none(self, buckets: Sequence[Gradients]) -> bool:
        """Whether a quick look finds no gradient at any parameter."""
        if self._num_watched != len(buckets):
            self._num_watched = len(buckets)
            self._watch = watch([param for own in buckets for param in own.bucket.params], no_grads=True)
        return self._watch is not None and self._watch.is_same()

    def adopt(self) -> list[tuple[int, int]]:
        """Take over what the script put in place of views; they stay shown. (bucket, parameter) without a gradient now."""
        missing = []
        touched = [(shown, grads_of(shown.params)) for shown in self._shown if not shown.is_untouched]
        given = {
            (shown.position, number): gradient
            for shown, found in touched
            for number, gradient in enumerate(found)
            if gradient is not None and gradient is not shown.faces[number]
        }
        if given:
            # What the script put there may be views itself, exchanged or transposed: copied before any is written.
            homes = {_home(view) for shown, _ in touched for view in shown.views}
            given = {at: gradient.clone() if _home(gradient) in homes else gradient for at, gradient in given.items()}
        for shown, found in touched:
            for number, gradient in enumerate(found):
                if gradient is None:
                    shown.views[number].zero_()  # adds nothing to the norm
                    missing.append((shown.position, number))
                elif gradient is shown.faces[number]:
                    shown.take_edits(number)
                else:
                    shown.views[number].copy_(given[shown.position, number])
        return missing

    def hide(self) -> None:
        """Take everything back, before a backward adds to it; a parameter without a gradient had none in this step."""
        missing = set(self.adopt())
        for shown in self._shown:
            shown.gradients.arrivals.used -= {number for position, number in missing if position == shown.position}
        self._take_back()

    def close(self) -> None:
        """Take everything back; the step is over."""
        self._take_back()
        self.veil.lift()

    def _take_back(self) -> None:
        for shown in self._shown:
            give_grads(shown.params, repeat(None))
        self._shown.clear()
        self.shows_any = False
