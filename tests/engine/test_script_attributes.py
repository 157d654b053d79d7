"""What scripts written for the original read of its engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from deepspeed.engine.script_attributes import LATER, ScriptAttributes
from tests.engine.runs import engine_of, make_config
from tests.harness import run_ranks
from tests.models import build


def answers(rank: int, world_size: int) -> dict[str, Any]:
    with engine_of(build("mlp"), make_config(2, micro=2)) as engine:
        for name in vars(ScriptAttributes):
            if not name.startswith("__"):
                getattr(engine, name)
        with pytest.raises(
            AttributeError, match="'train_batch': it comes with a deepspeed.PipelineModule, whose engine"
        ):
            engine.train_batch  # noqa: B018
        with pytest.raises(
            AttributeError, match="'get_pld_theta': it comes with progressive .*, which is not available"
        ):
            engine.get_pld_theta  # noqa: B018
        return {
            "group": dist.get_process_group_ranks(engine.dp_process_group),
            "gathered": [value.item() for value in engine.all_gather_scalar(torch.tensor(float(rank)))],
            "averages": engine.gradient_average,
            "later": [name for name in LATER if hasattr(engine, name)],
            "norm": engine._global_grad_norm,
            "experts": [engine.has_moe_layers, engine.num_experts, engine.moe_layers, engine.gate_modules],
        }


def test_the_engine_answers_what_has_a_meaning_here_and_names_the_feature_of_the_rest() -> None:
    for found in run_ranks(2, answers):
        assert found == {
            "group": [0, 1],
            "gathered": [0.0, 1.0],
            "averages": True,
            "later": [],
            "norm": None,
            "experts": [False, [], [], []],
        }
