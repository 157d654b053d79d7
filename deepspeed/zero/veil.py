"""Has a look at `param.grad` noticed while this step's gradients are slices on the ranks: it is None then, which torch's own
clipping, and a script that edits or drops gradients, passes over in silence.

Held by `zero.shown`, for buckets whose gradients are not whole on this rank; lowered after the boundary's backward, lifted when
the step is over. Parameters that are whole change class for that time; sharded ones have a class of their own, which asks
its bucket. A property of a class is the one way to see an attribute of a tensor read that costs a step nothing: the veil is down
in the first steps and in some of the later ones, until somebody was told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from deepspeed.utils.logging import warn_once
from deepspeed.zero.bucket import Bucket
from deepspeed.zero.param import HiddenGradient, ZeroParameter

ALWAYS_UNTIL = 3
"""In so many steps from the first the veil is down..."""

THEN_EVERY = 16
"""... and then once in so many."""


class VeiledParameter(HiddenGradient, nn.Parameter):
    """A parameter that is whole, while its gradient is not."""


class VeiledZeroParameter(HiddenGradient, ZeroParameter):
    """The same at stage 3, of one that is too small to be sharded."""


_VEILED: tuple[tuple[type[nn.Parameter], type[nn.Parameter]], ...] = (
    (nn.Parameter, VeiledParameter),
    (ZeroParameter, VeiledZeroParameter),
)


class Veil:
    """Over the parameters of some buckets."""

    def __init__(self) -> None:
        self.is_due = True
        """Whether it is to be lowered in this step."""
        self._buckets: list[Bucket] = []
        self._num_steps = 0
        self._has_told = False

    def lower(self, buckets: Sequence[Bucket]) -> None:
        """From now on reading the gradients of these tells the script, once, what it does not see."""
        if self._buckets or self._has_told:
            return
        self._buckets = list(buckets)
        for bucket in self._buckets:
            bucket.on_gradient_missed = self._tell
            if not bucket.is_sharded:
                _change_classes(bucket, dict(_VEILED))

    def lift(self) -> None:
        """They are as they were."""
        for bucket in self._buckets:
            bucket.on_gradient_missed = None
            if not bucket.is_sharded:
                _change_classes(bucket, {veiled: plain for plain, veiled in _VEILED})
        self._buckets = []

    def end_step(self) -> None:
        """A step is over that gradients were seen in."""
        self._num_steps += 1
        now = self._num_steps + 1
        self.is_due = not self._has_told and (now <= ALWAYS_UNTIL or now % THEN_EVERY == 0)

    def _tell(self, name: str) -> None:
        self._has_told = True
        self.lift()
        warn_once(
            f"{name}.grad is None between backward and step: at this ZeRO stage each rank has a slice of the averaged gradients. "
            "What the script makes of `param.grad` there (torch.nn.utils.clip_grad_norm_ and clip_grad_value_, edits, "
            "`= None`, zero_grad) has no effect.\n"
            '  To clip set "gradient_clipping"; the norm is engine.get_global_grad_norm(). To read and to write a gradient call '
            "deepspeed.utils.safe_get_full_grad(param) and safe_set_full_grad(param, value) on every rank."
        )


def _change_classes(bucket: Bucket, new: Mapping[type, type[nn.Parameter]]) -> None:
    for param in bucket.params:
        if type(param) in new:  # not a subclass that somebody brought
            param.__class__ = new[type(param)]
