"""All that an engine steps beside its weights: schedules by name, and what they change about inputs and weights.

Built by `engine.build`, with the learning rate as its first row; a feature adds its own there. Driven by the facade at the
boundary and by the conductor in forward; saved by `engine.checkpoints`.

    at the boundary    weights updated -> `on_update` -> every schedule's step, in the order in which they were added
    in forward         `input_steps`, each on what the one before made

Invariant: the rows and their order follow from the configuration, so they are the same on every rank and in a resumed run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from deepspeed.engine.scheduler_call import SchedulerCall
from deepspeed.utils.logging import log_dist
from deepspeed.utils.schedule import InputStep, Progress, Schedule, UpdateHook

LEARNING_RATE = "lr_scheduler"
"""The name of the learning rate's row, here and in checkpoints."""


@final
class LearningRate:
    """The row of the learning-rate scheduler, whichever object that is: steps it at steps that changed weights."""

    def __init__(self, scheduler: Any) -> None:
        self._call = SchedulerCall(scheduler)
        self._given: dict[str, Any] = {}
        self._num_samples = 0

    @property
    def scheduler(self) -> Any:
        """The scheduler; None for none."""
        return self._call.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        if scheduler is not self._call.scheduler:
            self._call = SchedulerCall(scheduler)

    def take(self, lr_kwargs: dict[str, Any], num_samples: int) -> None:
        """What the next step is called with. Raises TrainingStateError where it does not fit."""
        self._call.check(lr_kwargs)
        self._given, self._num_samples = lr_kwargs, num_samples

    def step(self, progress: Progress, was_applied: bool) -> None:
        """See Schedule."""
        given, self._given = self._given, {}
        if was_applied:
            self._call.step(given, self._num_samples)

    def state_dict(self) -> dict[str, Any] | None:
        """See Schedule."""
        state: dict[str, Any] | None = self.scheduler.state_dict() if self.scheduler is not None else None
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Schedule."""
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state)


@final
class Schedules:
    """The schedules of one engine."""

    def __init__(self, learning_rate: LearningRate) -> None:
        self.learning_rate = learning_rate
        self._rows: dict[str, Schedule] = {LEARNING_RATE: learning_rate}
        self.input_steps: list[InputStep] = []
        """What changes the arguments of forward."""
        self.on_update: list[UpdateHook] = []
        """What changes weights after an update."""

    def add(self, name: str, schedule: Schedule) -> None:
        """Step, save and resume one more, under a name of its own."""
        assert name not in self._rows, f"two schedules are called {name}"
        self._rows[name] = schedule

    def __getitem__(self, name: str) -> Schedule:
        return self._rows[name]

    def inputs(
        self, inputs: tuple[Any, ...], kwargs: dict[str, Any], is_training: bool
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The arguments of forward as the schedules have them."""
        changed: Mapping[str, Any] = kwargs
        for step in self.input_steps:
            inputs, changed = step(inputs, dict(changed), is_training)
        return inputs, changed

    def step(self, progress: Progress, was_applied: bool) -> None:
        """A step is over; `progress` counts it."""
        if was_applied:
            for hook in self.on_update:
                hook(progress)
        for schedule in self._rows.values():
            schedule.step(progress, was_applied)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """States by name, of those that have one."""
        states = {name: schedule.state_dict() for name, schedule in self._rows.items()}
        return {name: state for name, state in states.items() if state is not None}

    def load_state_dict(self, states: Mapping[str, dict[str, Any]]) -> None:
        """Resume those that have a state in `states`; says by name which begin anew, and which are not here any more."""
        for name, schedule in self._rows.items():
            if name in states:
                schedule.load_state_dict(states[name])
            elif name != LEARNING_RATE and schedule.state_dict() is not None:
                log_dist(f"the checkpoint has no state of the schedule {name}: it begins anew.", [0], 30)
        for name in states:
            if name not in self._rows:
                log_dist(f"the checkpoint's schedule {name} is not part of this run: it is left out.", [0], 30)
