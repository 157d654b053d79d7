"""Optimizers and schedules under the engine do what they do on whole parameters in plain PyTorch, at every ZeRO stage."""

from __future__ import annotations

import functools
import logging.handlers
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import deepspeed
from deepspeed.optim import build_optimizer, split_for_muon
from deepspeed.utils.errors import DeepSpeedConfigError, DeepSpeedError, TrainingStateError
from deepspeed.utils.logging import logger
from tests.engine.runs import EPS, LR, engine_of, make_config, whole_weights
from tests.harness import run_ranks
from tests.models import WIDTH, Mlp, build, make_batches, rank_share, squared_error
from tests.oracle import assert_close_weights, train_plain

STAGES = (0, 1, 2, 3)
SAMPLES, NUM_STEPS = 4, 4

CONFIGURED: dict[str, dict[str, Any]] = {
    "Adam": {"lr": LR, "eps": EPS, "weight_decay": 0.1},
    "AdamW": {"lr": LR, "eps": EPS},
    "SGD": {"lr": LR, "momentum": 0.9, "nesterov": True},
    "Adagrad": {"lr": LR},
    "Lion": {"lr": LR, "weight_decay": 0.1},
    "Lamb": {"lr": LR, "weight_decay": 0.1},
    "Muon": {"lr": LR},
    "Adadelta": {},
    "Adamax": {},
    "ASGD": {},
    "NAdam": {"eps": EPS},
    "RAdam": {},
    "RMSprop": {"lr": LR, "momentum": 0.5, "centered": True, "eps": EPS},
    "Rprop": {},
}


def train_mlp(engine: Any, rank: int, world_size: int, name: str = "mlp") -> dict[str, Tensor]:
    """A few steps on this rank's share of the usual batches; the whole weights after."""
    for (batch,) in make_batches(build("mlp"), num_steps=NUM_STEPS, accumulation=1, samples=SAMPLES):
        engine.backward(engine(*rank_share(batch, rank, world_size)))
        engine.step()
    return whole_weights(engine)


def plain_weights(
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer], **kwargs: Any
) -> dict[str, Tensor]:
    batches = make_batches(build("mlp"), num_steps=NUM_STEPS, accumulation=1, samples=SAMPLES)
    return train_plain(build("mlp"), batches, make_optimizer, **kwargs).weights


def config_of(stage: int, world_size: int, **zero: Any) -> dict[str, Any]:
    config = make_config(stage, micro=SAMPLES // world_size, zero=zero)
    del config["optimizer"]
    return config


def train_with_each(rank: int, world_size: int, stage: int, **zero: Any) -> dict[str, dict[str, Tensor]]:
    weights = {}
    for kind, params in CONFIGURED.items():
        config = {**config_of(stage, world_size, **zero), "optimizer": {"type": kind, "params": params}}
        with engine_of(build("mlp"), config) as engine:
            weights[kind] = train_mlp(engine, rank, world_size)
    return weights


@functools.lru_cache
def expected_of(kind: str) -> dict[str, Tensor]:
    def make(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        groups: Sequence[Any] = [{"params": params}]
        if kind == "Muon":
            names = [name for name, _ in build("mlp").named_parameters()]
            groups = split_for_muon(zip(names, params, strict=True), groups)
        return build_optimizer(kind, CONFIGURED[kind], groups)

    return plain_weights(make)


def assert_each_equals(weights: dict[str, dict[str, Tensor]]) -> None:
    for kind in CONFIGURED:
        try:
            assert_close_weights(weights[kind], expected_of(kind))
        except AssertionError as error:
            raise AssertionError(f"{kind}: {error}") from None


@pytest.mark.parametrize("stage", STAGES)
def test_every_configured_optimizer_steps_shards_as_it_steps_whole_parameters(stage: int) -> None:
    assert_each_equals(run_ranks(2, train_with_each, stage)[0])


def test_sub_groups_give_the_same_numbers() -> None:
    assert_each_equals(run_ranks(2, train_with_each, 3, sub_group_size=100)[0])


# Optimizers of the user. -----------------------------------------------------------------------------------------------


class Scaled(torch.optim.SGD):
    """Not of torch.optim itself: nobody knows that it is element-wise."""


def user_optimizers(rank: int, world_size: int, stage: int) -> dict[str, dict[str, Tensor]]:
    config = config_of(stage, world_size)
    weights = {}
    model = build("mlp")
    with engine_of(model, config, optimizer=torch.optim.AdamW(model.parameters(), lr=LR, eps=EPS)) as engine:
        weights["object"] = train_mlp(engine, rank, world_size)
    with engine_of(build("mlp"), config, optimizer=functools.partial(torch.optim.AdamW, lr=LR, eps=EPS)) as engine:
        weights["callable"] = train_mlp(engine, rank, world_size)
    with engine_of(build("mlp"), config, optimizer=torch.optim.AdamW) as engine:
        for group in engine.optimizer.param_groups:
            group.update(lr=LR, eps=EPS, weight_decay=0.01)
        weights["class"] = train_mlp(engine, rank, world_size)
    ours = {**config, "optimizer": {"type": "SGD", "params": {"lr": 0.5}}}
    with engine_of(build("mlp"), ours, optimizer=functools.partial(torch.optim.AdamW, lr=LR, eps=EPS)) as engine:
        weights["over the configured one"] = train_mlp(engine, rank, world_size)
    return weights


@pytest.mark.parametrize("stage", STAGES)
def test_the_users_optimizer_may_be_an_object_a_callable_or_a_class(stage: int) -> None:
    expected = plain_weights(lambda params: torch.optim.AdamW(params, lr=LR, eps=EPS))
    for weights in run_ranks(2, user_optimizers, stage)[0].values():
        assert_close_weights(weights, expected)


def untested_optimizer(rank: int, world_size: int) -> dict[str, Tensor]:
    def make(params: Any) -> Scaled:
        return Scaled(params, lr=LR)

    for stage in (1, 2, 3):
        with pytest.raises(
            DeepSpeedConfigError, match=rf"Scaled is not known .* ZeRO stage {stage}[\s\S]*zero_allow_untested_opt"
        ):
            deepspeed.initialize(model=build("mlp"), config=config_of(stage, world_size), optimizer=make)
    allowed = {**config_of(3, world_size), "zero_allow_untested_optimizer": True}
    notes = logging.handlers.BufferingHandler(100)
    logger.addHandler(notes)
    with engine_of(build("mlp"), allowed, optimizer=make) as engine:
        sharded = train_mlp(engine, rank, world_size)
    logger.removeHandler(notes)
    told = [record.getMessage() for record in notes.buffer]
    assert rank > 0 or any(
        "Scaled is not known to be element-wise. Under ZeRO stage 3 it steps" in text for text in told
    )
    with engine_of(build("mlp"), config_of(0, world_size), optimizer=make) as engine:
        assert_close_weights(train_mlp(engine, rank, world_size), sharded)
        assert {tuple(p.shape) for p in engine.optimizer.param_groups[0]["params"]} == {
            tuple(p.shape) for p in engine.module.parameters()
        }
    return sharded


def test_an_untested_optimizer_is_refused_on_shards_unless_allowed_and_gets_whole_parameters_at_stage_0() -> None:
    assert_close_weights(
        run_ranks(2, untested_optimizer)[0], plain_weights(lambda params: torch.optim.SGD(params, lr=LR))
    )


def cannot_step(rank: int, world_size: int) -> None:
    def closure_only(params: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(params)

    for stage in (0, 2):
        allowed = {**config_of(stage, world_size), "zero_allow_untested_optimizer": True}
        with pytest.raises(DeepSpeedError, match="LBFGS.step needs a closure"):
            deepspeed.initialize(model=build("mlp"), config=allowed, optimizer=closure_only)
    if not hasattr(torch.optim, "Muon"):
        return
    matrices = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    config = {**config_of(1, world_size), "zero_allow_untested_optimizer": True}
    with pytest.raises(
        DeepSpeedConfigError, match=r"Muon orthogonalizes whole matrices, of which ZeRO stage 1[\s\S]*stage 0"
    ):
        deepspeed.initialize(model=matrices, config=config, optimizer=torch.optim.Muon(matrices.parameters()))


def test_optimizers_that_cannot_step_from_what_zero_has_are_refused_by_name() -> None:
    run_ranks(2, cannot_step)


def scaled_by_torch(rank: int, world_size: int, is_enabled: bool) -> dict[str, Tensor]:
    def make(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=LR, eps=EPS)

    scaler = torch.amp.GradScaler("cpu", enabled=is_enabled)
    with engine_of(build("mlp"), config_of(2, world_size), optimizer=make) as engine:
        for (batch,) in make_batches(build("mlp"), num_steps=NUM_STEPS, accumulation=1, samples=SAMPLES):
            engine.backward(scaler.scale(engine(*rank_share(batch, rank, world_size))))
            if is_enabled:
                with pytest.raises(TrainingStateError, match=r"GradScaler cannot step this[\s\S]*enabled=False"):
                    scaler.step(engine.optimizer)
                return {}
            scaler.step(engine.optimizer)
            scaler.update()
        return whole_weights(engine)


def test_a_scaler_of_torchs_is_refused_unless_it_is_off() -> None:
    run_ranks(2, scaled_by_torch, True)
    expected = plain_weights(lambda params: torch.optim.AdamW(params, lr=LR, eps=EPS))
    assert_close_weights(run_ranks(2, scaled_by_torch, False)[0], expected)


# Parameter groups. -----------------------------------------------------------------------------------------------------


def awkward_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Interleaved groups with settings of their own, an empty one, one that is all frozen."""
    params = list(model.parameters())
    for param in params[4:8]:
        param.requires_grad_(False)
    rest = params[:4] + params[8:]
    return [
        {"params": rest[::2], "lr": LR, "weight_decay": 0.5, "name": "even"},
        {"params": [], "lr": 1.0},
        {"params": params[4:8], "lr": 1.0},
        {"params": rest[1::2], "lr": 10 * LR, "weight_decay": 0.0},
    ]


def train_groups(rank: int, world_size: int, stage: int, as_object: bool) -> dict[str, Tensor]:
    model = build("mlp")
    groups = awkward_groups(model)
    given: dict[str, Any] = {"model_parameters": groups}
    if as_object:
        given = {"optimizer": torch.optim.AdamW(groups, eps=EPS)}
    config = {**make_config(stage, micro=SAMPLES // world_size), "optimizer": {"type": "AdamW", "params": {"eps": EPS}}}
    with engine_of(model, config, **given) as engine:
        assert engine.get_lr() == [LR, 1.0, 1.0, 10 * LR]
        assert engine.optimizer.param_groups[0]["name"] == "even"
        return train_mlp(engine, rank, world_size)


@pytest.mark.parametrize("as_object", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_interleaved_empty_and_all_frozen_groups_keep_their_places_and_settings(stage: int, as_object: bool) -> None:
    model = build("mlp")
    optimizer = torch.optim.AdamW(awkward_groups(model), eps=EPS, weight_decay=0.01)
    for (batch,) in make_batches(model, num_steps=NUM_STEPS, accumulation=1, samples=SAMPLES):
        optimizer.zero_grad()
        model(*batch).backward()
        optimizer.step()
    weights = run_ranks(2, train_groups, stage, as_object)[0]
    assert_close_weights(weights, model.state_dict())


class Adapted(Mlp):
    """A frozen base with a low-rank adapter on each block, recomputed in backward: the shape of PEFT."""

    def __init__(self, use_reentrant: bool | None = None) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.adapters = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)) for _ in self.blocks
        )
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.use_reentrant is not None:
            x = x.clone().requires_grad_()  # what enable_input_require_grads does
        for block, adapter in zip(self.blocks, self.adapters, strict=True):
            layer = functools.partial(self._layer, block, adapter)
            recomputed = self.use_reentrant is not None
            x = (
                torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=self.use_reentrant)
                if recomputed
                else layer(x)
            )
        return squared_error(self.head(x), y)

    @staticmethod
    def _layer(block: nn.Module, adapter: nn.Module, x: Tensor) -> Tensor:
        return x + block(x) + adapter(x)


def adapted(use_reentrant: bool | None) -> Adapted:
    torch.manual_seed(5)
    return Adapted(use_reentrant)


def train_adapted(
    rank: int, world_size: int, stage: int, use_reentrant: bool | None, zero: dict[str, Any]
) -> list[dict[str, Tensor]]:
    model = adapted(use_reentrant)
    with engine_of(model, make_config(stage, micro=SAMPLES // world_size, zero=zero)) as engine:
        weights = train_mlp(engine, rank, world_size)
        trained = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    return [weights, trained or {}]


@pytest.mark.parametrize("use_reentrant", [None, True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_adapters_on_a_frozen_base_train_with_checkpointing_in_both_modes(
    stage: int, use_reentrant: bool | None
) -> None:
    def adamw(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=LR, weight_decay=0.01, eps=EPS)

    batches = make_batches(build("mlp"), num_steps=NUM_STEPS, accumulation=1, samples=SAMPLES)
    expected = train_plain(adapted(use_reentrant), batches, adamw).weights
    for zero in [{}, {"stage3_param_persistence_threshold": 0}][: 2 if stage == 3 else 1]:
        weights, trained = run_ranks(2, train_adapted, stage, use_reentrant, zero)[0]
        assert_close_weights(weights, expected)
        assert trained.keys() == {name for name in expected if name.startswith("adapters")}


# Schedules. ------------------------------------------------------------------------------------------------------------


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=10)


def warmup(optimizer: torch.optim.Optimizer) -> Any:
    return deepspeed.runtime.lr_schedules.WarmupLR(optimizer, warmup_max_lr=LR, warmup_num_steps=4)


def rates(engine: Any, rank: int, world_size: int) -> list[float]:
    """The rate of each step."""
    seen = []
    for (batch,) in make_batches(build("mlp"), num_steps=NUM_STEPS, accumulation=1, samples=SAMPLES):
        seen += engine.get_lr()
        engine.backward(engine(*rank_share(batch, rank, world_size)))
        engine.step()
    return seen


def rates_of_each(rank: int, world_size: int, stage: int) -> dict[str, list[float]]:
    seen = {}
    for make in (halving, one_cycle, warmup):
        config = make_config(stage, micro=SAMPLES // world_size)
        with engine_of(build("mlp"), config, lr_scheduler=make) as engine:
            seen[f"{make.__name__}, callable"] = rates(engine, rank, world_size)
        model = build("mlp")
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        with engine_of(model, config, optimizer=optimizer, lr_scheduler=make(optimizer)) as engine:
            seen[f"{make.__name__}, object"] = rates(engine, rank, world_size)
        with engine_of(build("mlp"), config) as engine:
            engine.lr_scheduler = make(engine.optimizer)
            seen[f"{make.__name__}, built on engine.optimizer"] = rates(engine, rank, world_size)
    section = {"type": "WarmupLR", "params": {"warmup_max_lr": LR, "warmup_num_steps": 4}}
    with engine_of(build("mlp"), {**config, "scheduler": section}) as engine:
        seen["warmup, configured"] = rates(engine, rank, world_size)
    return seen


@pytest.mark.parametrize("stage", [0, 3])
def test_schedules_advance_once_per_step_however_they_are_given(stage: int) -> None:
    expected = {}
    for make in (halving, one_cycle, warmup):
        optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=LR)
        scheduler = make(optimizer)
        expected[make.__name__] = []
        for _ in range(NUM_STEPS):
            expected[make.__name__].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    for how, seen in run_ranks(2, rates_of_each, stage)[0].items():
        assert seen == pytest.approx(expected[how.split(",")[0]]), how


def skipped_steps(rank: int, world_size: int, stage: int) -> None:
    fp16 = {"enabled": True, "initial_scale_power": 32, "hysteresis": 1}
    config = make_config(stage, micro=1, fp16=fp16)
    with engine_of(build("mlp"), config, lr_scheduler=halving) as engine:
        ((x, y),) = make_batches(build("mlp"), num_steps=1, accumulation=1, samples=1)[0]
        for _ in range(24):
            applied = engine.global_steps - engine.skipped_steps
            engine.backward(engine(x.half(), y.half()))
            engine.step()
            assert engine.was_step_applied() is not engine.optimizer.overflow
            assert engine.global_steps - engine.skipped_steps == applied + engine.was_step_applied()
            assert engine.get_lr() == [LR * 0.5 ** (engine.global_steps - engine.skipped_steps)]
        assert 0 < engine.skipped_steps < 24 == engine.global_steps


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_skipped_steps_do_not_advance_the_schedule(stage: int) -> None:
    run_ranks(2, skipped_steps, stage)


def scheduler_without_its_optimizer(rank: int, world_size: int) -> None:
    model = build("mlp")
    scheduler = halving(torch.optim.AdamW(model.parameters(), lr=LR))
    with pytest.raises(
        DeepSpeedError, match="lr_scheduler is an object, but the optimizer it schedules is not the one"
    ):
        deepspeed.initialize(model=model, config=make_config(1, micro=1), lr_scheduler=scheduler)


def test_a_torch_schedule_of_another_optimizer_is_refused() -> None:
    run_ranks(1, scheduler_without_its_optimizer)
