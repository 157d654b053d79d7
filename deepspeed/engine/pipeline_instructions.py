"""The contract's schedules on this package's executor: for engines that scripts derive from `PipelineEngine`.

Mixed into the pipeline engine, which carries out lists of actions. A script that has a schedule of its own, or another idea of an
instruction, says so in the original's words:

    class Mine(PipelineEngine):
        train_schedule = MySchedule                                            a subclass of PipeSchedule
        _INSTRUCTION_MAP = {**PipelineEngine._INSTRUCTION_MAP, Note: note}     note(engine, **what the instruction was made with)

The schedule is read for every rank as a list of actions, which is checked like any other; then its instructions are gone through one
by one. Forward and backward passes are that list's actions; sends, receives, loading and reducing happen by themselves where they have
to, so their handlers do nothing but may be replaced; any other instruction is its handler's affair.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

from deepspeed.parallel.pipeline import instructions as said
from deepspeed.parallel.pipeline.actions import Action, Actions, Op
from deepspeed.parallel.pipeline.check import require_training, require_valid
from deepspeed.parallel.pipeline.executor import Executor
from deepspeed.parallel.pipeline.layers import PipelineError
from deepspeed.parallel.pipeline.slots import PipeSchedule, TrainSchedule

Handler = Callable[..., None]


class Instructed:
    """Mixin of the pipeline engine."""

    train_schedule: ClassVar[type[PipeSchedule] | None] = None
    """A subclass's; None for the configuration's list, or the original's own where only instructions were replaced."""
    _INSTRUCTION_MAP: ClassVar[Mapping[type[said.PipeInstruction], Handler]] = {}
    _executor: Executor
    module: Any
    _do: Callable[[Action], None]
    _pending: dict[tuple[int, Op], int]
    """By stage, the next micro-batch of each op, while a schedule is gone through."""

    def _own_schedule(self, num_micro: int) -> PipeSchedule | None:
        """The schedule that a subclass has; None where the engine's lists hold."""
        kind = self.train_schedule
        if kind is None and self._INSTRUCTION_MAP is not HANDLERS:
            kind = TrainSchedule
        if kind is None:
            return None
        if not (isinstance(kind, type) and issubclass(kind, PipeSchedule)):
            raise PipelineError(
                f"{type(self).__name__}.train_schedule is {kind!r}, not a class derived from deepspeed.runtime.pipe.schedule.PipeSchedule."
            )
        return kind(num_micro, self.module.num_stages, self.module.stage_id)

    def _exec_schedule(self, pipe_schedule: PipeSchedule) -> None:
        """Carry out a schedule's instructions. Raises PipelineError for one that has no handler."""
        stages = self.module.num_stages
        make = functools.partial(type(pipe_schedule), pipe_schedule.micro_batches, stages)
        actions = actions_of([make(rank) for rank in range(stages)], self.module.rank_of)
        require_valid(actions)
        require_training(actions)
        self._executor.run(actions, functools.partial(self._go_through, pipe_schedule))

    def _go_through(self, pipe_schedule: PipeSchedule, do: Callable[[Action], None]) -> None:
        self._do, self._pending = do, {}
        for commands in _steps(pipe_schedule):
            for command in commands:
                handler = self._INSTRUCTION_MAP.get(type(command))
                if handler is None:
                    raise PipelineError(
                        f"{type(self).__name__} does not understand the instruction {command!r}.\n  Give its _INSTRUCTION_MAP a handler."
                    )
                handler(self, **command.kwargs)

    def _pass(self, op: Op, phase: int) -> None:
        stage = self.module.own_stages[phase]
        micro = self._pending.get((stage, op), 0)
        self._pending[stage, op] = micro + 1
        self._do(Action(stage, op, micro))

    def _exec_forward_pass(self, buffer_id: int, phase: int = 0) -> None:
        """The stage's forward of its next micro-batch: inputs in, outputs on their way."""
        self._pass(Op.FORWARD, phase)

    def _exec_backward_pass(self, buffer_id: int, phase: int = 0) -> None:
        """Its backward: gradients in, gradients of the inputs on their way."""
        self._pass(Op.BACKWARD, phase)

    def _exec_nothing(self, **kwargs: Any) -> None:
        """What happens by itself."""


HANDLERS: dict[type[said.PipeInstruction], Handler] = {
    said.ForwardPass: Instructed._exec_forward_pass,
    said.BackwardPass: Instructed._exec_backward_pass,
    **dict.fromkeys(
        (
            said.OptimizerStep, said.ReduceGrads, said.ReduceTiedGrads, said.CommitP2P, said.LoadMicroBatch, said.SendActivation,
            said.RecvActivation, said.SendGrad, said.RecvGrad,
        ),
        Instructed._exec_nothing,
    ),
}  # fmt: skip
Instructed._INSTRUCTION_MAP = HANDLERS


def _steps(schedule: PipeSchedule) -> Iterator[list[said.PipeInstruction]]:
    """A schedule's slots. Raises PipelineError for what are none."""
    name, steps = type(schedule).__name__, schedule.steps()
    if not isinstance(steps, Iterable):
        raise PipelineError(f"{name}.steps() returns a {type(steps).__name__}.\n  Have it yield lists of instructions.")
    for commands in steps:
        wrong = (
            commands
            if not isinstance(commands, (list, tuple))
            else next((command for command in commands if not isinstance(command, said.PipeInstruction)), None)
        )
        if wrong is not None:
            raise PipelineError(
                f"{name}.steps() yields {wrong!r}: each step is a list of instructions, [ForwardPass(buffer_id), ...]."
            )
        yield list(commands)


def actions_of(schedules: list[PipeSchedule], rank_of: tuple[int, ...]) -> Actions:
    """The list that the schedules of all ranks describe by their forward and backward passes."""
    lists = []
    for rank, schedule in enumerate(schedules):
        stages = [stage for stage, owner in enumerate(rank_of) if owner == rank]
        counted: dict[tuple[int, Op], int] = {}
        row = []
        for commands in _steps(schedule):
            for command in commands:
                op = next((op for kind, op in _OPS.items() if isinstance(command, kind)), None)
                if op is not None:
                    stage = stages[int(command.kwargs.get("phase", 0))]
                    row.append(Action(stage, op, counted.get((stage, op), 0)))
                    counted[stage, op] = row[-1].micro + 1
        lists.append(tuple(row))
    return Actions(tuple(lists), rank_of, schedules[0].micro_batches, type(schedules[0]).__name__)


_OPS: dict[type[said.PipeInstruction], Op] = {said.ForwardPass: Op.FORWARD, said.BackwardPass: Op.BACKWARD}
