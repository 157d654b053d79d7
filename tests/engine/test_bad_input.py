"""What bad input gets: one clear error, on every rank, before a collective could hang; each tested by its words."""

from __future__ import annotations

import os
import pathlib
import re
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.precision import LossScaleFloorError
from deepspeed.utils.errors import (
    DeepSpeedConfigError,
    DeepSpeedError,
    RankMismatchError,
    ShardError,
    TrainingStateError,
)
from tests.engine.runs import engine_of, make_config
from tests.harness import run_ranks
from tests.models import WIDTH, build, make_batches

STAGES = (0, 1, 2, 3)


def bad(**changes: Any) -> dict[str, Any]:
    """A good configuration with some keys changed; None takes a key away."""
    return {key: value for key, value in {**make_config(2, micro=2), **changes}.items() if value is not None}


def with_zero(**zero: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 2, **zero}}


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "typo at the top": (bad(gradient_clipp1ng=1.0), r"gradient_clipp1ng.*\n?.*gradient_clipping"),
    "typo in a section": (
        bad(**with_zero(reduce_bucket_sise=5)),
        r"zero_optimization.reduce_bucket_sise.*\n?.*reduce_bucket_size",
    ),
    "typo two levels down": (
        bad(**with_zero(offload_optimizer={"devize": "none"})),
        r"offload_optimizer.devize.*\n?.*device",
    ),
    "batch sizes": (
        bad(train_batch_size=48),
        r"train_batch_size is not equal to micro_batch_per_gpu[\s\S]*48 != 2 \* 1 \* 2[\s\S]*world size",
    ),
    "fp16 and bf16": (bad(fp16={"enabled": True}, bf16={"enabled": True}), r"bf16.*fp16|fp16.*bf16"),
    "optimizer": (bad(optimizer={"type": "AdmaW"}), r"optimizer.type: AdmaW is not a supported .*[\s\S]*AdamW"),
    "optimizer setting": (
        bad(optimizer={"type": "AdamW", "params": {"learning_rate": 1}}),
        r"optimizer.params.learning_rate[\s\S]*lr",
    ),
    "scheduler": (bad(scheduler={"type": "WarmupLr"}), r"scheduler.type.*WarmupLr[\s\S]*WarmupLR"),
    "scheduler setting": (
        bad(scheduler={"type": "WarmupLR", "params": {"warmup_steps": 1}}),
        r"warmup_steps[\s\S]*warmup_num_steps",
    ),
    "missing file": ("no/such/ds_config.json", r"no/such/ds_config.json"),  # type: ignore[dict-item]
    "feature to come": (bad(tensor_parallel={"kernel_inject": True}), r"tensor_parallel.*not available yet"),
}


def refuse_configs(rank: int, world_size: int) -> dict[str, str]:
    """The message of each bad configuration on this rank."""
    messages = {}
    for name, (config, _) in CONFIGS.items():
        with pytest.raises(DeepSpeedError) as caught:
            deepspeed.initialize(model=build("mlp"), config=config)
        messages[name] = str(caught.value)
    return messages


def test_bad_configurations_are_refused_alike_on_every_rank() -> None:
    first, second = run_ranks(2, refuse_configs)
    assert first == second
    for name, (_, words) in CONFIGS.items():
        assert re.search(words, first[name]), f"{name}: {first[name]}"


def malformed_files(rank: int, world_size: int, folder: str) -> None:
    texts = {
        '{"train_batch_size": 1, "train_batch_size": 2}': r"gives keys twice: train_batch_size\.\n  Keep one",
        '{"train_batch_size": ': r"config\.json[\s\S]*line 1",
        "[1, 2]": r"object|dict",
    }
    for text, words in texts.items():
        path = pathlib.Path(folder, "config.json")
        path.write_text(text)
        for how in ({"config": str(path)}, {"args": Namespace(deepspeed_config=str(path))}):
            with pytest.raises(DeepSpeedConfigError, match=words):
                deepspeed.initialize(model=build("mlp"), **how)


def test_malformed_files_are_refused_by_their_line(tmp_path: pathlib.Path) -> None:
    run_ranks(1, malformed_files, str(tmp_path))


def without_optimizer(rank: int, world_size: int) -> str:
    engine, optimizer, *_ = deepspeed.initialize(
        model=build("mlp"), config={**make_config(2, micro=2), "optimizer": None}
    )
    assert optimizer is None
    with pytest.raises(DeepSpeedError) as caught:
        engine.backward(next(engine.parameters()).sum())
    engine.destroy()
    return str(caught.value)


def test_an_engine_that_has_nothing_to_shard_evaluates_and_refuses_to_train() -> None:
    assert run_ranks(1, without_optimizer)[0].startswith("engine.backward: the engine has no optimizer.")


# Models, parameters and arguments. -------------------------------------------------------------------------------------


def wrapped() -> Any:
    return nn.parallel.DistributedDataParallel(build("mlp"))


def stranger() -> torch.optim.Optimizer:
    return torch.optim.AdamW(build("mlp").parameters(), lr=1e-3)


ARGUMENTS: list[tuple[Callable[[], dict[str, Any]], str]] = [
    (lambda: {"model": None}, r"requires a model: got model=None\.\n  Pass an nn\.Module"),
    (lambda: {"model": lambda x: x}, r"deepspeed\.initialize\(model=\.\.\.\) is a function, not an nn\.Module"),
    (lambda: {"model": wrapped()}, r"already wrapped in DistributedDataParallel[\s\S]*bare module \(model\.module\)"),
    (
        lambda: {"model_parameters": []},
        r"optimizer\.type = 'AdamW' has no parameters to train: model_parameters is empty",
    ),
    (lambda: {"model": build("mlp").requires_grad_(False), "model_parameters": iter(())}, r"model_parameters is empty"),
    (lambda: {"optimizer": "AdamW"}, r"optimizer=\.\.\.\) is a str: neither a torch\.optim\.Optimizer nor a callable"),
    (lambda: {"optimizer": stranger()}, r"14 of the optimizer's parameters do not belong to the model"),
    (lambda: {"config": None}, r"got no configuration\.\n  Pass config="),
    (
        lambda: {"args": Namespace(deepspeed_config="a.json")},
        r"got two configurations: config= and --deepspeed_config a\.json",
    ),
    (lambda: {"args": Namespace(local_rank=7)}, r"args\.local_rank = 7, but the environment says LOCAL_RANK = \d"),
    (
        lambda: {"model": build("mlp").to("meta")},
        r"blocks\.0\.0\.weight has no values \(it is on the meta device\)[\s\S]*to_empty",
    ),
    (lambda: {"config_params": make_config(1, micro=2)}, r"got two configurations: config= and config_params="),
]


def refuse_arguments(rank: int, world_size: int) -> None:
    for arguments, words in ARGUMENTS:
        with pytest.raises(AssertionError, match=words):
            deepspeed.initialize(**{"model": build("mlp"), "config": make_config(2, micro=2), **arguments()})
    with engine_of(build("mlp"), make_config(2, micro=2)) as engine:
        with pytest.raises(
            DeepSpeedError, match=r"already a DeepSpeedEngine\.\n  Pass engine\.module, after engine\.destroy"
        ):
            deepspeed.initialize(model=engine, config=make_config(2, micro=2))
        rank_before = os.environ["LOCAL_RANK"]
        assert engine.local_rank == int(rank_before)


def test_bad_arguments_are_refused_by_their_words() -> None:
    run_ranks(2, refuse_arguments)


# Ranks that differ. ----------------------------------------------------------------------------------------------------


def differing_ranks(rank: int, world_size: int) -> None:
    config = make_config(2, micro=2)
    theirs = make_config(2, micro=2, zero={"reduce_bucket_size": 999}) if rank == 1 else config
    with pytest.raises(
        RankMismatchError, match=r"same configuration[\s\S]*rank 1: has .*reduce_bucket_size = 999 where .* = 600"
    ):
        deepspeed.initialize(model=build("mlp"), config=theirs)
    more = {**config, "bf16": {"enabled": True}} if rank == 2 else config
    with pytest.raises(
        RankMismatchError,
        match=r"same configuration[\s\S]*rank 2: has bf16.enabled = True[\s\S]*Give every rank the same",
    ):
        deepspeed.initialize(model=build("mlp"), config=more)
    other = build("shared" if rank == 2 else "mlp")
    with pytest.raises(
        RankMismatchError, match=r"same model[\s\S]*rank 2: has first.weight \(16, 16\) where .* blocks.0.0.weight"
    ):
        deepspeed.initialize(model=other, config=config)
    frozen = build("mlp")
    frozen.head.bias.requires_grad_(rank != 1)
    with pytest.raises(RankMismatchError, match=r"rank 1: has head.bias \(4,\) frozen where .* head.bias \(4,\)"):
        deepspeed.initialize(model=frozen, config=config)
    extra = build("mlp")
    if rank == 1:
        extra.more = nn.Linear(2, 2)
    with pytest.raises(RankMismatchError, match=r"rank 1: has more.weight \(2, 2\) where .* nothing"):
        deepspeed.initialize(model=extra, config=config)


def test_ranks_with_other_configurations_or_models_are_named() -> None:
    run_ranks(3, differing_ranks)


def differing_buffers(rank: int, world_size: int) -> None:
    model = build("mlp")
    model.register_buffer("table", torch.zeros(3 + rank))
    with pytest.raises(
        RankMismatchError, match=r"rank 1: has buffer table \(4,\) float32 where .* table \(3,\) float32"
    ):
        deepspeed.initialize(model=model, config=make_config(1, micro=2))


def test_ranks_with_other_buffers_are_named() -> None:
    run_ranks(2, differing_buffers)


def meta_buffer() -> None:
    model = build("mlp")
    model.head.register_buffer("table", torch.zeros(3, device="meta"))
    with pytest.raises(DeepSpeedConfigError, match=r"the buffer head.table has no values \(it is on the meta device\)"):
        deepspeed.initialize(model=model, config=make_config(1, micro=2))


def test_a_buffer_without_values_is_named() -> None:
    run_ranks(1, _alone, meta_buffer)


def _alone(rank: int, world_size: int, check: Callable[[], None]) -> None:
    check()


# Calls out of order. ---------------------------------------------------------------------------------------------------


def out_of_order(rank: int, world_size: int, stage: int) -> None:
    ((batch,),) = make_batches(build("mlp"), num_steps=1, accumulation=1, samples=2)
    with engine_of(build("mlp"), make_config(stage, micro=2)) as engine:
        with pytest.raises(
            TrainingStateError, match=r"engine\.step\(\) before backward[\s\S]*Call engine\.backward\(loss\)"
        ):
            engine.step()
        loss = engine(*batch)
        with pytest.raises(AssertionError, match=r"must be a scalar tensor, got a tensor of shape \(2,\)"):
            engine.backward(loss.repeat(2))
        with pytest.raises(AssertionError, match=r"must be a scalar tensor, got a float"):
            engine.backward(loss.item())
        with pytest.raises(AssertionError, match=r"the loss does not require grad"):
            engine.backward(loss.detach())
        engine.backward(loss)
        engine.step()
        with pytest.raises(RuntimeError, match=r"engine\.step\(\) before backward"):
            engine.step()


@pytest.mark.parametrize("stage", STAGES)
def test_step_before_backward_and_bad_losses_are_refused(stage: int) -> None:
    run_ranks(2, out_of_order, stage)


def sharded_arithmetic(rank: int, world_size: int) -> None:
    with engine_of(build("mlp"), make_config(3, micro=2)) as engine:
        weight = engine.module.head.weight
        for use in (
            lambda: weight + 1,
            lambda: weight.sum(),
            lambda: weight.tolist(),
            lambda: torch.save(weight, os.devnull),
        ):
            with pytest.raises(
                ShardError, match=r"head\.weight is sharded[\s\S]*full shape \(4, 16\)[\s\S]*GatheredParameters"
            ):
                use()


def test_a_sharded_parameter_in_arithmetic_names_itself_and_the_cure() -> None:
    run_ranks(2, sharded_arithmetic)


# NaN under fp16. -------------------------------------------------------------------------------------------------------


def nan_at_the_floor(rank: int, world_size: int, stage: int) -> None:
    fp16 = {"enabled": True, "initial_scale_power": 1, "hysteresis": 1, "min_loss_scale": 1}
    torch.manual_seed(0)
    x, y = torch.randn(2, WIDTH).half(), torch.randn(2, 4).half()
    with engine_of(build("mlp"), make_config(stage, micro=2, fp16=fp16)) as engine:

        def step(poisoned: bool) -> None:
            loss = engine(x, y)
            engine.backward(loss * float("nan") if poisoned else loss)
            engine.step()

        step(rank == 1)
        assert engine.skipped_steps == 1 and engine.loss_scale() == 1.0 and not engine.was_step_applied()
        with pytest.raises(LossScaleFloorError) as caught:
            step(rank == 1)
        message = str(caught.value)
        assert "Current loss scale already at minimum" in message
        assert re.search(r"first bad gradient: (blocks|head)[.\w]* has nan", message), message
        assert re.search(r'Largest weight [\d.]+ \(fp16 ends at 65504\)[\s\S]*"bf16": \{"enabled": true\}', message), (
            message
        )


@pytest.mark.parametrize("stage", STAGES)
def test_nan_under_fp16_skips_and_at_the_floor_names_the_first_bad_parameter(stage: int) -> None:
    run_ranks(2, nan_at_the_floor, stage)


def lazy_model(rank: int, world_size: int) -> None:
    lazy = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    with pytest.raises(
        DeepSpeedError, match=r"0.weight and \d more of the model has no shape yet[\s\S]*Run the model once"
    ):
        deepspeed.initialize(model=lazy, config=bad())
    lazy(torch.randn(2, 3))
    with engine_of(lazy, bad()) as engine:
        assert engine(torch.randn(2, 3)).shape == (2, 4)


def test_lazy_modules_have_to_run_once() -> None:
    run_ranks(2, lazy_model)
