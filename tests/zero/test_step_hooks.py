"""Hooks on an optimizer's step run once per step, whatever pieces the step is made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deepspeed
from tests.edits import Net, batch_of
from tests.engine.runs import engine_of
from tests.harness import run_ranks


def seen(rank: int, world_size: int, stage: int, zero: dict[str, Any], is_own: bool) -> list[str]:
    """What hooks before initialize and after it saw, in order; `step` stands where the engine's step has ended."""
    torch.manual_seed(0)
    model, events = Net(), []
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage, **zero},
        "zero_force_ds_cpu_optimizer": False,
    }
    kwargs: dict[str, Any] = {}
    if is_own:
        kwargs["optimizer"] = torch.optim.AdamW(model.parameters(), lr=1e-2)
        kwargs["optimizer"].register_step_pre_hook(lambda *given: events.append("before"))
    else:
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2}}
    with engine_of(model, config, **kwargs) as engine:
        param = engine.module.first.weight

        def weight() -> float:
            whole = deepspeed.utils.safe_get_full_fp32_param(param)
            assert whole is not None
            return float(whole.sum())

        values: list[float] = []
        engine.optimizer.register_step_pre_hook(lambda *given: values.append(weight()))
        handle = engine.optimizer.register_step_post_hook(lambda *given: values.append(weight()))
        engine.optimizer.register_step_post_hook(lambda *given: events.append("after"))
        for step in range(3):
            if step == 2:
                handle.remove()
            engine.backward(engine(*batch_of(step)))
            engine.step()
            events.append("step")
        assert len(values) == 5 and values[0] != values[1] == values[2] != values[3]
        engine.optimizer.register_state_dict_post_hook(lambda *given: events.append("state"))
        engine.optimizer.state_dict()
    return events


CASES: list[tuple[int, dict[str, Any], bool]] = [
    (0, {}, True),
    (2, {}, False),
    (3, {"sub_group_size": 64}, True),
    (3, {"offload_optimizer": {"device": "cpu"}, "sub_group_size": 64}, False),
]


@pytest.mark.parametrize(("stage", "zero", "is_own"), CASES)
def test_once_per_step_around_the_update(stage: int, zero: dict[str, Any], is_own: bool) -> None:
    one = [*(["before"] if is_own else []), "after", "step"]
    assert run_ranks(2, seen, stage, zero, is_own) == [[*one * 3, "state"]] * 2
