"""Averaged gradients shown to the script as `param.grad`, between the boundary's backward and the step; and those it assigns.

Owned by the reducer. Plain PyTorch's scripts read `param.grad` there, edit it, put another tensor or None in its place.
Where a bucket's averaged gradients are whole on this rank each parameter is shown its view of them, so that an edit in
place is an edit of what is stepped; whatever else the script did is taken over before the step reads them:

    another tensor    its values are what is stepped
    None              the parameter is left out of the step, on this rank, as every optimizer skips `grad is None`

What is shown is another tensor of the view's memory, so that nothing that a script does to it (`grad.data = ...`, `detach_()`)
is done to the view. Gradients that add up in another dtype than the parameter's cannot be `param.grad`: a copy is shown, and the
elements that the script changed in it are taken over. Where ranks have slices nothing is shown; a gradient that the script assigns there,
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

from deepspeed.kernels.native_watch import Watch, watch
from deepspeed.zero.bucket import is_view
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
    """Of the views' memory, or copies in the parameters' dtype."""
    watch: Watch | None
    """Whether those of the views' memory still are."""

    def is_still(self, gradients: Gradients, views: Sequence[Tensor]) -> bool:
        """Whether these are what is to be shown of the bucket's parameters now."""
        pairs = ((self.params, gradients.bucket.params), (self.views, views))
        return all(len(own) == len(now) and all(map(is_, own, now)) for own, now in pairs) and self.is_in_place

    @property
    def is_in_place(self) -> bool:
        """Whether what was written to the faces was written to the views."""
        return self.watch is not None and self.watch.is_same()

    @property
    def is_untouched(self) -> bool:
        """Whether nothing was assigned to any of the parameters, and what was written was written to the views."""
        return all(map(is_, grads_of(self.params), self.faces)) and self.is_in_place

    def is_face(self, number: int, gradient: Tensor) -> bool:
        """Whether this is what was shown, with the memory that it had."""
        view, face = self.views[number], self.faces[number]
        return gradient is face and (face.dtype != view.dtype or is_view(face, view))

    def take_edits(self, number: int) -> None:
        """Have in a view what the script changed in the copy of it, without rounding the rest."""
        view, face = self.views[number], self.faces[number]
        if face.dtype != view.dtype:
            view.copy_(torch.where(view.to(face.dtype) == face, view, face))


def _faces_of(position: int, gradients: Gradients, views: Sequence[Tensor]) -> _Shown:
    params = list(gradients.bucket.params)
    if gradients.bucket.full.dtype is not gradients.dtype:
        copies = [view.to(param.dtype) for view, param in zip(views, params, strict=True)]
        return _Shown(position, gradients, params, views, copies, None)
    faces = [view.data for view in views]
    return _Shown(position, gradients, params, views, faces, watch(faces, memory=True))


def _dense(gradient: Tensor, homes: set[int | None]) -> Tensor:
    """A gradient of memory of its own, so that it may be copied into any of the views."""
    if gradient.layout is not torch.strided:
        return gradient.to_dense()
    return gradient.clone() if _home(gradient) in homes else gradient


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
        self._known: dict[int, _Shown] = {}
        """By position: what was shown last, which is shown again where it is as it was."""
        self._num_watched, self._watch = 0, watch([])
        self.veil = Veil()
        """For buckets that show nothing, until `close`."""

    def show(self, buckets: Sequence[Gradients]) -> None:
        """Show what is whole on this rank; what is shown already stays as the script left it."""
        if self.shows_any:
            return
        for position, gradients in enumerate(buckets):
            if gradients.shown:
                known = self._known.get(position)
                views = gradients.shown[: len(gradients.bucket.params)]
                if known is None or not known.is_still(gradients, views):
                    known = self._known[position] = _faces_of(position, gradients, views)
                give_grads(known.params, known.faces)
                self._shown.append(known)
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
            if gradient is not None and not shown.is_face(number, gradient)
        }
        if given:
            # What the script put there may be views itself, exchanged or transposed: copied before any is written.
            homes = {_home(view) for shown, _ in touched for view in shown.views}
            given = {at: _dense(gradient, homes) for at, gradient in given.items()}
        for shown, found in touched:
            for number, gradient in enumerate(found):
                if gradient is None:
                    shown.views[number].zero_()  # adds nothing to the norm
                    missing.append((shown.position, number))
                elif shown.is_face(number, gradient):
                    shown.take_edits(number)
                else:
                    shown.views[number].copy_(given[shown.position, number])
                    shown.gradients.arrivals.used.add(number)  # whether a backward had given it one or not
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
