"""The hooks of stage 3 in other libraries' hands: the protocol of TRL, step by step."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import pytest
import torch

import deepspeed
from tests.engine.runs import engine_of, make_config, whole_weights
from tests.harness import run_ranks
from tests.models import build, make_batches, rank_share
from tests.oracle import assert_close_weights


def take_off(offload: Any) -> None:
    """What TRL does before it generates."""
    module = offload.module
    for _, param in itertools.chain(module.named_parameters(recurse=True), module.ds_external_parameters()):
        param.ds_active_sub_modules.clear()
    for handle in itertools.chain(offload.forward_hooks, offload.backward_hooks):
        handle.remove()
    offload.forward_hooks = []
    offload.backward_hooks = []


def train_with_generation_between(rank: int, world_size: int, generates: bool) -> dict[str, torch.Tensor]:
    model = build("gpt_tied")
    batches = make_batches(model, num_steps=3, accumulation=1, samples=4)
    with engine_of(model, make_config(3, micro=2)) as engine:
        offload = engine.optimizer.parameter_offload
        num_hooks = len(offload.forward_hooks)
        assert num_hooks > 0
        for (batch,) in batches:
            mine = rank_share(batch, rank, world_size)
            if generates:
                with torch.no_grad():
                    expected = engine(*mine)
                with deepspeed.zero.GatheredParameters(engine.parameters()):
                    take_off(offload)
                    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
                    with torch.no_grad():
                        torch.testing.assert_close(engine.module(*mine), expected)
                    offload._register_deepspeed_module(offload.module)
                    offload._register_deepspeed_module(offload.module)
                    assert len(offload.forward_hooks) == num_hooks
            engine.backward(engine(*mine))
            engine.step()
        return whole_weights(engine)


def test_hooks_taken_off_and_put_back_change_nothing() -> None:
    expected = run_ranks(2, train_with_generation_between, False)[0]
    assert_close_weights(run_ranks(2, train_with_generation_between, True)[0], expected, tolerance=0.0)


def of_an_evaluator(rank: int, world_size: int) -> None:
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": make_config(3, micro=1)["zero_optimization"]}
    model = build("gpt_tied")
    with engine_of(model, config) as engine:
        offload = engine.optimizer
        assert isinstance(offload, deepspeed.runtime.zero.parameter_offload.DeepSpeedZeRoOffload)
        assert offload.module is model and not hasattr(offload, "parameter_offload")
        deepspeed.zero.register_external_parameter(model, model.norm.weight)
        assert [param for _, param in model.ds_external_parameters()] == [model.norm.weight]
        assert all(list(module.ds_external_parameters()) == [] for module in model.modules() if module is not model)
        with deepspeed.zero.GatheredParameters(model.parameters()):
            take_off(offload)
            offload._register_deepspeed_module(offload.module)
    assert not any("ds_external_parameters" in module.__dict__ for module in model.modules())
    with engine_of(build("mlp"), make_config(0, micro=1)) as engine:
        assert engine.optimizer.parameter_offload is None
        pickle.dumps(engine.module)


def test_an_engine_without_optimizer_has_the_hooks_owner_in_its_place() -> None:
    run_ranks(2, of_an_evaluator)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_parameter_group_knows_the_model_s_parameters(stage: int) -> None:
    run_ranks(2, membership, stage)


def membership(rank: int, world_size: int, stage: int) -> None:
    model = build("mlp")
    params = list(model.parameters())
    groups = [{"params": params[::2], "lr": 1e-3}, {"params": params[1::2], "lr": 2e-3}]
    with engine_of(model, make_config(stage, micro=1), model_parameters=groups) as engine:
        for i, param in enumerate(params):
            assert [param in group["params"] for group in engine.optimizer.param_groups] == [i % 2 == 0, i % 2 == 1]
        runs = engine.optimizer.param_groups[0]["params"]
        assert (
            all(run in runs for run in runs)
            and torch.zeros(3) not in runs
            and type(pickle.loads(pickle.dumps(runs))) is list
        )
