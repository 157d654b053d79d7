"""Schedules beside the learning rate's: inputs and weights that change as a run goes on, equal to plain PyTorch, and resumed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import deepspeed
from deepspeed.engine.schedules import LearningRate, Schedules
from deepspeed.utils.logging import logger
from deepspeed.utils.schedule import Progress
from tests.edits import two_sides
from tests.engine.runs import engine_of, make_config, mean_over_ranks
from tests.harness import run_ranks
from tests.models import Model, build, make_batches, rank_share, total_loss

STEPS = 4
DECAY = 0.9
CAP = 0.2


class Dose:
    """Inputs are multiplied by what grows from step to step: by what was, not by how many steps there were."""

    def __init__(self) -> None:
        self.factor = 0.25
        self.seen: list[tuple[int, int, bool]] = []

    def step(self, progress: Progress, was_applied: bool) -> None:
        self.factor *= 1.5
        self.seen.append((progress.global_steps, progress.global_samples, was_applied))

    def change(
        self, inputs: tuple[Any, ...], kwargs: dict[str, Any], is_training: bool
    ) -> tuple[Any, Mapping[str, Any]]:
        x, *rest = inputs
        return (x * self.factor if is_training else x, *rest), kwargs

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self.factor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.factor = state["factor"]


class Cap:
    """Weights stay within bounds that shrink with the steps."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def __call__(self, progress: Progress) -> None:
        with deepspeed.zero.GatheredParameters(self._model.parameters(), modifier_rank=0), torch.no_grad():
            for param in self._model.parameters():
                param.clamp_(-CAP * DECAY**progress.global_steps, CAP * DECAY**progress.global_steps)


def add_schedules(engine: Any) -> Dose:
    dose = Dose()
    engine._schedules.add("dose", dose)
    engine._schedules.input_steps.append(dose.change)
    engine._schedules.on_update.append(Cap(engine.module))
    return dose


def batches_of(model: Model, world_size: int) -> list[Any]:
    return [batch for (batch,) in make_batches(model, num_steps=STEPS, accumulation=1, samples=2 * world_size)]


def weights_of(model: Model) -> dict[str, Tensor]:
    with deepspeed.zero.GatheredParameters(model.parameters()):
        return {name: param.detach().clone() for name, param in model.named_parameters()}


def train(engine: Any, batches: list[Any], rank: int, world_size: int) -> list[float]:
    losses = []
    for batch in batches:
        loss = total_loss(engine(*rank_share(batch, rank, world_size)))
        engine.backward(loss)
        engine.step()
        losses.append(mean_over_ranks(loss))
    return losses


def _scheduled(rank: int, world_size: int, stage: int, folder: str) -> tuple[Any, ...]:
    """Losses, weights, what the schedule saw; and the losses and weights of a run that was resumed half-way."""
    model = build("mlp")
    config = make_config(stage, micro=2, scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 6}})
    batches = batches_of(model, world_size)
    with engine_of(model, config) as engine:
        dose = add_schedules(engine)
        losses = train(engine, batches[:2], rank, world_size)
        engine.save_checkpoint(folder)
        losses += train(engine, batches[2:], rank, world_size)
        weights, seen = weights_of(model), dose.seen
    again = build("mlp", seed=5)
    with engine_of(again, config) as engine:
        dose = add_schedules(engine)
        engine.load_checkpoint(folder)
        resumed = train(engine, batches[2:], rank, world_size)
        return losses, weights, seen, resumed, weights_of(again)


def _plain(world_size: int) -> tuple[list[float], dict[str, Tensor]]:
    model = build("mlp")
    params = make_config(0, micro=2)["optimizer"]["params"]
    optimizer = torch.optim.AdamW(model.parameters(), **params)
    warmup = deepspeed.runtime.lr_schedules.WarmupLR(optimizer, warmup_num_steps=6)
    losses, factor = [], 0.25
    for step, (x, y) in enumerate(batches_of(model, world_size)):
        loss = total_loss(model(x * factor, y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for param in model.parameters():
                param.clamp_(-CAP * DECAY ** (step + 1), CAP * DECAY ** (step + 1))
        warmup.step()
        factor *= 1.5
        losses.append(loss.item())
    return losses, {name: param.detach() for name, param in model.named_parameters()}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_inputs_and_weights_follow_their_schedules_as_in_plain_pytorch_and_resume_bit_for_bit(
    stage: int, tmp_path: Path
) -> None:
    plain_losses, plain_weights = _plain(2)
    for losses, weights, seen, resumed, resumed_weights in run_ranks(2, _scheduled, stage, str(tmp_path)):
        assert losses == pytest.approx(plain_losses, rel=1e-5)
        for name, weight in plain_weights.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-6)
            assert torch.equal(weights[name], resumed_weights[name]), name
        assert resumed == losses[2:]
        assert seen == [(1, 4, True), (2, 8, True), (3, 12, True), (4, 16, True)]


def progress(steps: int = 1) -> Progress:
    return Progress(global_steps=steps, global_samples=steps, skipped_steps=0)


def test_a_skipped_step_moves_schedules_but_neither_the_learning_rate_nor_the_weights() -> None:
    rate = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD([torch.zeros(1)]))
    schedules, dose, updates = Schedules(LearningRate(rate)), Dose(), []
    schedules.add("dose", dose)
    schedules.on_update.append(updates.append)
    before = rate.last_epoch
    schedules.step(progress(), was_applied=False)
    assert (rate.last_epoch, updates, dose.seen) == (before, [], [(1, 1, False)])


def test_input_steps_change_what_the_ones_before_made() -> None:
    schedules = Schedules(LearningRate(None))
    schedules.input_steps += [
        lambda inputs, kwargs, is_training: ((inputs[0] + 1,), kwargs),
        lambda inputs, kwargs, is_training: ((inputs[0] * 10,), {**kwargs, "theta": is_training}),
    ]
    assert schedules.inputs((1,), {"mask": None}, True) == ((20,), {"mask": None, "theta": True})


def test_schedules_that_a_checkpoint_lacks_or_a_run_lacks_are_told_by_name(caplog: pytest.LogCaptureFixture) -> None:
    schedules = Schedules(LearningRate(None))
    schedules.add("dose", Dose())
    logger.addHandler(caplog.handler)
    try:
        schedules.load_state_dict({"tokens": {}})
    finally:
        logger.removeHandler(caplog.handler)
    said = " ".join(caplog.messages)
    assert "no state of the schedule dose" in said and "schedule tokens is not part of this run" in said


def test_two_schedules_of_one_name_are_refused() -> None:
    schedules = Schedules(LearningRate(None))
    with pytest.raises(AssertionError, match="lr_scheduler"):
        schedules.add("lr_scheduler", Dose())


def step_streamed(rank: int, world_size: int) -> None:
    with two_sides(rank, world_size, 3, torch.bfloat16, "adamw", offload_optimizer={"device": "cpu"}) as (_, side):
        side.engine.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(side.client, lambda t: 1.0)
        side.backward(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            side.step()


def test_torch_sees_that_an_offloaded_optimizer_stepped_before_its_schedule_on_each_rank() -> None:
    run_ranks(2, step_streamed)
