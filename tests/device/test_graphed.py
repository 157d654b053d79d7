"""The update as a graph of the device: the numbers of steps that run as they always do, and when there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepspeed.accelerator import get_accelerator
from deepspeed.zero.graphed import why_not
from tests.device.test_training import IS_WHOLE
from tests.engine.runs import Run, engine_of, make_config, on_device, train
from tests.harness import run_ranks
from tests.models import build, make_batches, total_loss

NUM_STEPS = 7
RATES = {"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_max_lr": 3e-3, "warmup_type": "linear"}}
LOW = {"fp16": {"enabled": True, "initial_scale_power": 18, "hysteresis": 1}}
"""Begins with steps that overflow and are skipped."""


def graphed(rank: int, world_size: int, config: dict[str, Any]) -> tuple[Run, int]:
    """A run, and how many of its updates were replays."""
    engines: list[Any] = []
    run = train(rank, world_size, "gpt_tied", config, num_steps=NUM_STEPS, prepare=engines.append)
    update = engines[0].optimizer.graphed
    return run, update.num_replays if update else 0


CASES = [(stage, low) for stage in range(4) for low in ({}, LOW)] if IS_WHOLE else [(0, {}), (2, {}), (3, LOW)]


@pytest.mark.parametrize(("stage", "low"), CASES)
def test_a_replayed_update_has_the_numbers_of_one_that_is_not(stage: int, low: dict[str, Any]) -> None:
    config = make_config(stage, micro=3, clip=0.5, scheduler=RATES, **low)
    run, num_replays = run_ranks(2, graphed, {**config, "graph_harvesting": True}, device="sim")[0]
    expected, none = run_ranks(2, graphed, config, device="sim")[0]
    assert none == 0 and run.skipped == expected.skipped and bool(low) == (run.skipped > 0)
    assert num_replays >= NUM_STEPS - run.skipped - 3, "one step makes the states, one is the first of its kind"
    assert run.grad_norms == pytest.approx(expected.grad_norms, rel=1e-6 if not low else 1e-3, nan_ok=True)
    for name, weight in expected.weights.items():
        torch.testing.assert_close(run.weights[name], weight, rtol=0, atol=1e-6 if not low else 1e-4)


def edited(rank: int, world_size: int) -> tuple[list[int], int]:
    """Replays so far after each of some steps, between which something is done to the optimizer; calls of its hook."""
    config = make_config(1, micro=3, graph_harvesting=True)
    counts, calls = [], []
    model = build("mlp")
    batch = make_batches(model, num_steps=1, accumulation=1, samples=3)[0][0]
    with engine_of(model, config) as engine:
        batch = on_device(batch, engine.device)
        group = engine.optimizer.param_groups[0]
        for step in range(9):
            if step == 4:
                group["weight_decay"] = 0.1
            if step == 7:
                engine.optimizer.optimizer.register_step_post_hook(lambda *arguments: calls.append(1))
            engine.backward(total_loss(engine(*batch)))
            engine.step()
            counts.append(engine.optimizer.graphed.num_replays)
    return counts, len(calls)


def test_another_setting_is_recorded_anew_and_a_hook_is_called() -> None:
    assert run_ranks(1, edited, device="sim")[0] == ([0, 0, 1, 2, 2, 3, 4, 5, 6], 2)


def reasons(rank: int, world_size: int) -> list[str | None]:
    """Why steps cannot be recorded: of an optimizer that reads on the host, of states in main memory, of nothing."""
    found = []
    for more in ({}, {"torch_adam": True}):
        config = make_config(1, micro=3, graph_harvesting=True)
        config["optimizer"]["params"] |= more
        with engine_of(build("mlp"), config) as engine:
            found.append(why_not(engine.optimizer.runs, get_accelerator()))
            assert (engine.optimizer.graphed is None) == (found[-1] is not None)
    config = make_config(1, micro=3, zero={"offload_optimizer": {"device": "cpu"}}, graph_harvesting=True)
    with engine_of(build("mlp"), config) as engine:
        return [*found, why_not(engine.optimizer.runs, get_accelerator())]


def test_what_cannot_be_recorded_is_said() -> None:
    ours, torchs, offloaded = run_ranks(1, reasons, device="sim")[0]
    assert ours is None
    assert torchs == "AdamW reads its settings on the host; FusedAdam, and torch's with capturable=True, do not"
    assert offloaded == "masters or parameters rest on another tier"
    assert run_ranks(1, reasons)[0][0] == "cpu has no graphs"
