"""The contract's schedules in slots, and the description of a hop."""

from __future__ import annotations

import pytest
import torch

from deepspeed.parallel.pipeline.form import decode, form_of
from deepspeed.runtime.pipe import schedule


def test_a_stage_alone_loads_computes_and_steps() -> None:
    steps = list(schedule.TrainSchedule(micro_batches=4, stages=1, stage_id=0))
    assert len(steps) == 8
    for i, commands in enumerate(steps):
        kinds = [type(command) for command in commands]
        if i % 2 == 0:
            assert kinds == [schedule.LoadMicroBatch, schedule.ForwardPass]
        elif i < 7:
            assert kinds == [schedule.BackwardPass]
        else:
            assert kinds[0] is schedule.BackwardPass and kinds[-1] is schedule.OptimizerStep and len(kinds) == 4


@pytest.mark.parametrize("stage", range(4))
def test_a_training_schedule_hops_to_neighbours_only(stage: int) -> None:
    made = schedule.TrainSchedule(micro_batches=6, stages=4, stage_id=stage)
    steps = [command for commands in made for command in commands]
    assert len(list(made)) == 2 * (6 + 4 - 1)
    counts = {kind.__name__: sum(type(c) is kind for c in steps) for kind in (
        schedule.ForwardPass, schedule.BackwardPass, schedule.SendActivation, schedule.RecvActivation, schedule.SendGrad,
        schedule.RecvGrad, schedule.LoadMicroBatch,
    )}  # fmt: skip
    ends = 6 * (stage in (0, 3))
    assert counts == {
        "ForwardPass": 6, "BackwardPass": 6, "SendActivation": 6 * (stage < 3), "RecvActivation": 6 * (stage > 0),
        "SendGrad": 6 * (stage > 0), "RecvGrad": 6 * (stage < 3), "LoadMicroBatch": ends,
    }  # fmt: skip
    assert all(c.buffer_id < made.num_pipe_buffers() for c in steps if isinstance(c, schedule.BufferOpInstruction))


def test_the_first_stage_of_an_inference_schedule_sends_what_it_computed_last() -> None:
    steps = list(schedule.InferenceSchedule(micro_batches=4, stages=3, stage_id=0))
    assert len(steps) == 6
    assert [len(commands) for commands in steps] == [2, 3, 3, 3, 1, 0]
    assert type(steps[4][0]) is schedule.SendActivation


def test_dual_pipe_v_needs_two_micro_batches_per_stage() -> None:
    with pytest.raises(ValueError, match="twice as many micro-batches"):
        schedule.DualPipeVSchedule(3, 2, 0)
    steps = [c for commands in schedule.DualPipeVSchedule(4, 2, 1) for c in commands]
    assert sum(type(c) is schedule.ForwardPass for c in steps) == 8


def test_instructions_say_what_they_were_made_with() -> None:
    made = schedule.SendGrad(buffer_id=3, extra="x")
    assert (made.buffer_id, made.extra, made.name) == (3, "x", "SendGrad")
    assert repr(made) == "SendGrad(buffer_id=3, extra='x')"


def test_a_hop_is_described_in_at_most_64_bytes() -> None:
    hidden = torch.zeros(2, 5, 8, dtype=torch.bfloat16, requires_grad=True)
    values = [
        hidden,
        torch.zeros(2, 1, 5, 5, dtype=torch.bool),
        None,
        torch.zeros(2, 5, dtype=torch.int64),
        torch.zeros(()),
    ]
    form = form_of(values, True)
    assert decode(form.encode()) == form
    assert len(form.encode()) <= 64
    assert form.nbytes == 2 * 80 + 50 + 80 + 4
