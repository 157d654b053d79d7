"""The contract's schedules: for each slot of time the instructions of one stage. Pure; for scripts that read or extend them.

    slot 0         1         2         3         4         5         6         7         8         9
    F0             -         F1        B0        -         B1  ...             stage 0 of 2, 4 micro-batches
                   F0        B0        F1        B1        ...                 stage 1

The engine itself carries out lists of actions (`schedules/`), which say the same without slots.

After PipeDream-flush (arXiv:2006.09503); the numbers are the contract's.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator

from deepspeed.parallel.pipeline.actions import Op
from deepspeed.parallel.pipeline.instructions import (
    BackwardPass,
    ForwardPass,
    LoadMicroBatch,
    OptimizerStep,
    PipeInstruction,
    RecvActivation,
    RecvGrad,
    ReduceGrads,
    ReduceTiedGrads,
    SendActivation,
    SendGrad,
)
from deepspeed.parallel.pipeline.schedules import dual_pipe_v
from deepspeed.utils.errors import DeepSpeedError


class PipeSchedule(abc.ABC):
    """What one stage does with `micro_batches`; iterates over slots, each a list of instructions."""

    def __init__(self, micro_batches: int, stages: int, stage_id: int) -> None:
        self.micro_batches, self.stages, self.stage_id = micro_batches, stages, stage_id
        self.prev_stage, self.next_stage = stage_id - 1, stage_id + 1
        self._steps: Iterator[list[PipeInstruction]] | None = None

    @abc.abstractmethod
    def steps(self) -> Iterator[list[PipeInstruction]]:
        """The slots."""

    def num_pipe_buffers(self) -> int:
        """Micro-batches that are alive at once at most; buffers are numbered below it."""
        return self.micro_batches

    @property
    def stage(self) -> int:
        """This stage."""
        return self.stage_id

    @property
    def num_stages(self) -> int:
        """All stages."""
        return self.stages

    @property
    def num_micro_batches(self) -> int:
        """Per step."""
        return self.micro_batches

    @property
    def is_first_stage(self) -> bool:
        """Whether this is the first stage."""
        return self.stage_id == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this is the last stage."""
        return self.stage_id == self.stages - 1

    def _valid_micro_batch(self, micro_batch_id: int) -> bool:
        return 0 <= micro_batch_id < self.micro_batches

    def _valid_stage(self, stage_id: int) -> bool:
        return 0 <= stage_id < self.stages

    def _buffer_idx(self, micro_batch_id: int) -> int:
        return micro_batch_id % self.num_pipe_buffers()

    def __iter__(self) -> PipeSchedule:
        self._steps = None
        return self

    def __next__(self) -> list[PipeInstruction]:
        if self._steps is None:
            self._steps = self.steps()
        return next(self._steps)


class InferenceSchedule(PipeSchedule):
    """Forwards alone, two buffers in turn; a slot sends what the one before computed."""

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """See PipeSchedule."""
        for slot in range(self.micro_batches + self.stages - 1):
            micro, commands = slot - self.stage_id, []
            receives, sends = ((slot + self.stage_id + i) % 2 for i in (0, 1))
            is_valid, was_valid = self._valid_micro_batch(micro), self._valid_micro_batch(micro - 1)
            receive: list[PipeInstruction] = (
                [RecvActivation(receives)] if is_valid and self._valid_stage(self.prev_stage) else []
            )
            send: list[PipeInstruction] = (
                [SendActivation(sends)] if was_valid and self._valid_stage(self.next_stage) else []
            )
            commands = receive + send if self.stage_id % 2 else send + receive
            if is_valid and (self.is_first_stage or self.is_last_stage):
                commands.append(LoadMicroBatch(receives))
            if is_valid:
                commands.append(ForwardPass(receives))
            yield commands

    def num_pipe_buffers(self) -> int:
        """See PipeSchedule."""
        return 2


class TrainSchedule(PipeSchedule):
    """One forward, one backward: slots of the stage's parity are forward slots, others backward slots."""

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """See PipeSchedule."""
        before = -1
        num_slots = 2 * (self.micro_batches + self.stages - 1)
        for slot in range(num_slots):
            micro, is_forward = self._step_to_micro_batch(slot)
            commands: list[PipeInstruction] = self._hops(micro, before, is_forward)
            if self._valid_micro_batch(micro):
                buffer = self._buffer_idx(micro)
                if is_forward and (self.is_first_stage or self.is_last_stage):
                    commands.append(LoadMicroBatch(buffer))
                commands.append(ForwardPass(buffer) if is_forward else BackwardPass(buffer))
            if slot == num_slots - 1:
                commands += [ReduceTiedGrads(), ReduceGrads(), OptimizerStep()]
            before = micro
            yield commands

    def _hops(self, micro: int, before: int, is_forward: bool) -> list[PipeInstruction]:
        """A forward slot sends the last slot's gradient and receives an activation; a backward slot the reverse."""
        now, then = self._valid_micro_batch(micro), self._valid_micro_batch(before)
        has_previous, has_next = self._valid_stage(self.prev_stage), self._valid_stage(self.next_stage)
        hops: list[PipeInstruction] = []
        if is_forward:
            if then and has_previous:
                hops.append(SendGrad(self._buffer_idx(before)))
            if now and has_previous:
                hops.append(RecvActivation(self._buffer_idx(micro)))
        else:
            if now and has_next:
                hops.append(RecvGrad(self._buffer_idx(micro)))
            if then and has_next:
                hops.append(SendActivation(self._buffer_idx(before)))
        return hops

    def _step_to_micro_batch(self, slot: int) -> tuple[int, bool]:
        stage, stages = self.stage_id, self.stages
        if slot % 2 == stage % 2:
            return (slot // 2 - stage // 2 if slot % 2 == 0 else (slot - 1) // 2 - stage // 2), True
        if slot % 2 == 0:
            return slot // 2 - stages + (stage + 1) // 2, False
        return (slot - 1) // 2 - stages + 1 + stage // 2, False

    def num_pipe_buffers(self) -> int:
        """See PipeSchedule."""
        return max(2, min(self.stages - self.stage_id, self.micro_batches))


class DataParallelSchedule(PipeSchedule):
    """One stage: forward and backward of each micro-batch, then the step."""

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """See PipeSchedule."""
        for micro in range(self.micro_batches):
            commands: list[PipeInstruction] = [LoadMicroBatch(0), ForwardPass(0), BackwardPass(0)]
            if micro == self.micro_batches - 1:
                commands += [ReduceGrads(), OptimizerStep()]
            yield commands

    def num_pipe_buffers(self) -> int:
        """See PipeSchedule."""
        return 1


class DualPipeVSchedule(PipeSchedule):
    """A slot per action of DualPipeV; instructions have `phase` 0 or 1 for the rank's first or second stage.

    Raises DeepSpeedError (a ValueError) for fewer micro-batches than twice the ranks.
    """

    def __init__(self, micro_batches: int, stages: int, stage_id: int) -> None:
        super().__init__(micro_batches, stages, stage_id)
        if micro_batches < 2 * stages:
            raise DeepSpeedError(
                f"DualPipeV needs at least twice as many micro-batches as pipeline ranks: {micro_batches} < 2 * {stages}."
            )

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """See PipeSchedule."""
        row = dual_pipe_v(self.stages, self.micro_batches).lists[self.stage_id]
        last = 2 * self.stages - 1
        for i, action in enumerate(row):
            phase = int(action.stage != self.stage_id)
            buffer = action.micro + phase * self.micro_batches
            commands: list[PipeInstruction] = []
            if action.op is Op.FORWARD:
                if action.stage > 0:
                    commands.append(RecvActivation(buffer, phase=phase))
                if action.stage in (0, last):
                    commands.append(LoadMicroBatch(buffer, phase=phase))
                commands.append(ForwardPass(buffer, phase=phase))
                if action.stage < last:
                    commands.append(SendActivation(buffer, phase=phase))
            elif action.op is not Op.WEIGHT:
                if action.stage < last:
                    commands.append(RecvGrad(buffer, phase=phase))
                commands.append(BackwardPass(buffer, phase=phase))
                if action.stage > 0:
                    commands.append(SendGrad(buffer, phase=phase))
            if i == len(row) - 1:
                commands += [ReduceTiedGrads(), ReduceGrads(), OptimizerStep()]
            yield commands

    def num_pipe_buffers(self) -> int:
        """See PipeSchedule."""
        return 2 * self.micro_batches
