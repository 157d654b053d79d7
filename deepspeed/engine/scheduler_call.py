"""How the engine steps a learning-rate scheduler, whatever arguments its `step` takes.

Built by the engine for the scheduler it holds, and asked at every boundary. The signature is read once: a scheduler
whose `step` can be called without arguments is stepped; one that needs a metric or an epoch is stepped with
`engine.step(lr_kwargs=...)` or by the script, never with a number of ours in its place. Megatron's schedulers count
samples, in an argument `increment`, and the engine knows that number.

Invariant: arguments that do not fit are refused before the step, and an error inside the scheduler is the script's.
"""

from __future__ import annotations

import inspect
from typing import Any

from deepspeed.utils.errors import TrainingStateError
from deepspeed.utils.logging import warn_once

_SAMPLES = "increment"
"""The name under which a `step` asks for the samples since the last one."""


class SchedulerCall:
    """The call of one scheduler's `step`."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self._name = f"{type(scheduler).__name__}.step"
        self._signature = _signature_of(scheduler.step) if scheduler is not None else None
        parameters = self._signature.parameters.values() if self._signature is not None else ()
        self._needed = [
            p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]

    def check(self, lr_kwargs: dict[str, Any]) -> None:
        """Raise TrainingStateError where `lr_kwargs` do not fit; nothing has been stepped yet."""
        if lr_kwargs and self.scheduler is None:
            warn_once(
                f"engine.step(lr_kwargs={sorted(lr_kwargs)}): the engine has no learning-rate scheduler; no effect."
            )
        if not lr_kwargs or self._signature is None:
            return
        try:
            self._signature.bind(**lr_kwargs)
        except TypeError as error:
            raise TrainingStateError(
                f"lr_kwargs = {lr_kwargs!r} do not fit {self._name}{self._signature}: {error}.\n"
                "  Give engine.step the arguments of the scheduler's step, by name."
            ) from None

    def step(self, lr_kwargs: dict[str, Any], num_samples: int) -> None:
        """Step the scheduler, unless it needs what nobody gave. `num_samples` is the batch of one step."""
        if self.scheduler is None:
            return
        if not lr_kwargs and self._needed == [_SAMPLES]:
            lr_kwargs = {_SAMPLES: num_samples}
        if self._needed and not lr_kwargs:
            needed = ", ".join(self._needed)
            warn_once(
                f"engine.step() does not step the learning-rate scheduler: {self._name} needs {needed}.\n"
                f'  Call engine.step(lr_kwargs={{"{self._needed[0]}": ...}}), or step the scheduler in the script.'
            )
            return
        self.scheduler.step(**lr_kwargs)


def _signature_of(step: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(step)
    except (TypeError, ValueError):  # a callable of compiled code
        return None
