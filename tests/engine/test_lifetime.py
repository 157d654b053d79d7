"""How engines end, copies of models, and compiled models."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch

import deepspeed
from deepspeed.utils.errors import DeepSpeedError, NotAvailableError, TrainingStateError
from tests.edits import assert_same, two_sides
from tests.engine.runs import EPS, LR, engine_of, make_config, small_units, whole_weights
from tests.harness import run_ranks
from tests.models import build, make_batches, rank_share
from tests.oracle import assert_close_weights, train_plain

STAGES = (0, 1, 2, 3)
SAMPLES = 4


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=LR, weight_decay=0.01, eps=EPS)


def batches_of(name: str, num_steps: int) -> list[Any]:
    return make_batches(build(name), num_steps=num_steps, accumulation=1, samples=SAMPLES)


def train_some(engine: Any, rank: int, world_size: int, batches: list[Any]) -> None:
    for (batch,) in batches:
        engine.backward(engine(*rank_share(batch, rank, world_size)))
        engine.step()


def make_engine(model: Any, stage: int, world_size: int) -> Any:
    with small_units():
        return deepspeed.initialize(model=model, config=make_config(stage, micro=SAMPLES // world_size))[0]


# One engine after another. ---------------------------------------------------------------------------------------------


def in_turn(rank: int, world_size: int, stages: tuple[int, int], by_destroy: bool) -> dict[str, torch.Tensor]:
    model = build("gpt_tied")
    batches = batches_of("gpt_tied", 4)
    engine = make_engine(model, stages[0], world_size)
    train_some(engine, rank, world_size, batches[:2])
    if by_destroy:
        engine.destroy()
        with pytest.raises(TrainingStateError, match="this engine was destroyed"):
            engine(*batches[0][0])
        engine.destroy()
    del engine
    gc.collect()
    with engine_of(model, make_config(stages[1], micro=SAMPLES // world_size)) as second:
        train_some(second, rank, world_size, batches[2:])
        return whole_weights(second)


@pytest.mark.parametrize("by_destroy", [True, False])
@pytest.mark.parametrize("stages", [(3, 3), (3, 0), (0, 3), (2, 1)])
def test_a_model_goes_from_one_engine_to_the_next(stages: tuple[int, int], by_destroy: bool) -> None:
    batches = batches_of("gpt_tied", 4)
    half = train_plain(build("gpt_tied"), batches[:2], adamw)
    expected = train_plain(half.model, batches[2:], adamw)
    assert_close_weights(run_ranks(2, in_turn, stages, by_destroy)[0], expected.weights)


def taken_over(rank: int, world_size: int, stage: int) -> None:
    model = build("gpt_tied")
    batch = batches_of("gpt_tied", 1)[0][0]
    evaluator = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage if stage == 3 else 0}}
    with small_units():
        scorer, optimizer, *_ = deepspeed.initialize(model=model, config=evaluator)
    assert optimizer is None
    with torch.no_grad():
        before = scorer(*batch)
    trainer = make_engine(model, stage, world_size)
    with torch.no_grad():
        torch.testing.assert_close(trainer(*batch), before)
    with pytest.raises(TrainingStateError, match="this engine was destroyed, or its model given to a newer engine"):
        scorer(*batch)
    with engine_of(model, evaluator) as second, torch.no_grad():
        torch.testing.assert_close(second(*batch), before)
        with pytest.raises(TrainingStateError, match="this engine was destroyed"):
            trainer(*batch)


@pytest.mark.parametrize("stage", STAGES)
def test_a_newer_engine_takes_the_model_over(stage: int) -> None:
    run_ranks(2, taken_over, stage)


def freed(rank: int, world_size: int, stage: int) -> None:
    batches = batches_of("mlp", 2)
    model = build("mlp")
    engine = make_engine(model, stage, world_size)
    train_some(engine, rank, world_size, batches)
    optimizer = weakref.ref(engine.optimizer)
    engine_ref, reducer = weakref.ref(engine), weakref.ref(engine._reducer)
    del engine
    gc.collect()
    assert [engine_ref(), optimizer(), reducer()] == [None] * 3
    left = [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    assert left == [] and not any(param._post_accumulate_grad_hooks for param in model.parameters())
    if stage < 3:
        x, y = batches[0][0]
        model(x, y).backward()
        assert all(param.grad is not None for param in model.parameters())
    whole = make_engine(model, stage, world_size)
    model_ref = weakref.ref(model)
    del whole, model
    gc.collect()
    assert model_ref() is None


@pytest.mark.parametrize("stage", STAGES)
def test_a_dropped_engine_is_freed_with_its_hooks(stage: int) -> None:
    run_ranks(2, freed, stage)


# Copies. ---------------------------------------------------------------------------------------------------------------


def copies(rank: int, world_size: int, stage: int) -> None:
    model = build("gpt_tied")
    with engine_of(model, make_config(stage, micro=2)) as engine:
        train_some(engine, rank, world_size, batches_of("gpt_tied", 1))
        batch = batches_of("gpt_tied", 1)[0][0]
        with torch.no_grad():
            expected = engine(*batch)
        buffer = io.BytesIO()
        torch.save(engine.module, buffer)
        buffer.seek(0)
        kinds = [
            copy.deepcopy(engine.module),
            pickle.loads(pickle.dumps(engine.module)),
            torch.load(buffer, weights_only=False),
        ]
        for copied in kinds:
            torch.testing.assert_close(copied(*batch), expected)
            assert copied.head.weight is copied.embedding.weight
            copied(*batch).backward()
            assert engine._reducer.saw_backward is False and copied.norm.weight.grad is not None
        fresh = build("gpt_tied")
        fresh.load_state_dict(engine.module.state_dict())
        torch.testing.assert_close(fresh(*batch), expected)
        for refused in (copy.deepcopy, pickle.dumps):
            with pytest.raises(DeepSpeedError, match="an engine cannot be (copied|pickled): it owns process groups"):
                refused(engine)
            with pytest.raises(DeepSpeedError, match="an engine's optimizer cannot be copied or pickled"):
                refused(engine.optimizer)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_module_of_an_engine_can_be_copied_and_saved_and_the_engine_says_that_it_cannot(
    stage: int,
) -> None:
    run_ranks(2, copies, stage)


def gathered_copy(rank: int, world_size: int) -> None:
    with engine_of(build("mlp"), make_config(3, micro=2)) as engine:
        with pytest.raises(
            DeepSpeedError, match=r"weight is sharded and cannot be used in 'copy.deepcopy'[\s\S]*GatheredParameters"
        ):
            copy.deepcopy(engine.module)
        with deepspeed.zero.GatheredParameters(engine.module.parameters()):
            copied = copy.deepcopy(engine.module)
        assert_close_weights(copied.state_dict(), build("mlp").state_dict())
        x, y = batches_of("mlp", 1)[0][0]
        copied(x, y).backward()


def test_at_stage_3_a_gathered_module_can_be_copied() -> None:
    run_ranks(2, gathered_copy)


# Compiled models. ------------------------------------------------------------------------------------------------------


def compiled(rank: int, world_size: int, stage: int) -> dict[str, torch.Tensor]:
    with engine_of(build("mlp"), make_config(stage, micro=SAMPLES // world_size, accumulation=1)) as engine:
        assert not engine.is_compiled
        engine.compile(backend="aot_eager", compile_kwargs={"dynamic": False})
        engine.compile()
        assert engine.is_compiled
        train_some(engine, rank, world_size, batches_of("mlp", 3))
        with pytest.raises(NotAvailableError, match="schedule"):
            engine.__class__.compile(mark_uncompiled(engine), schedule=[(0, [])])
        return whole_weights(engine)


def mark_uncompiled(engine: Any) -> Any:
    engine._is_compiled = False
    return engine


@pytest.mark.parametrize("stage", STAGES)
def test_a_compiled_model_gives_the_same_numbers(stage: int) -> None:
    expected = train_plain(build("mlp"), batches_of("mlp", 3), adamw).weights
    assert_close_weights(run_ranks(2, compiled, stage, timeout=180)[0], expected)


def compiled_in_part(rank: int, world_size: int, in_place: bool) -> None:
    def edit(side: Any) -> None:
        if in_place:
            side.module.layers[0].compile(backend="eager")
        else:
            side.module.layers[0] = torch.compile(side.module.layers[0], backend="eager")

    with two_sides(rank, world_size, 3) as (plain, side):
        for either in (plain, side):
            for seed in range(4):
                if seed == 2:
                    edit(either)
                either.backward(seed)
                either.step()
        assert_same(plain, side)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_script_may_compile_a_submodule_with_the_hooks_that_it_has_at_stage_3(world_size: int) -> None:
    for in_place in (False, True):
        run_ranks(world_size, compiled_in_part, in_place, timeout=180)
