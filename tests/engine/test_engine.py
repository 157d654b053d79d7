"""What callers read and set on the engine: gradients, norms, rates, batch sizes, and what integrations rely on."""

from __future__ import annotations

import gc
import inspect
import pathlib
from argparse import Namespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.utils.errors import DeepSpeedError, TrainingStateError
from tests.engine.runs import EPS, LR, engine_of, make_config, small_units, whole_weights
from tests.harness import run_alone, run_ranks
from tests.models import Batch, build, make_batches, rank_share
from tests.oracle import assert_close_weights, train_plain

STAGES = (0, 1, 2, 3)
SAMPLES = 4


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=LR, weight_decay=0.01, eps=EPS)


def steps_of(name: str, num_steps: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
    """One micro-batch per step, this rank's share."""
    batches = make_batches(build(name), num_steps=num_steps, accumulation=1, samples=SAMPLES)
    return [rank_share(batch, rank, world_size) for (batch,) in batches]


def train_step(engine: Any, batch: Batch) -> Tensor:
    loss = engine(*batch)
    engine.backward(loss)
    engine.step()
    return loss


# Gradients. ------------------------------------------------------------------------------------------------------------


def param_grads(rank: int, world_size: int) -> None:
    # In float64, whose rounding no processor's way of adding shows through.
    plain = build("unused").double()
    (batch,), *_ = make_batches(build("unused"), num_steps=1, accumulation=1, samples=SAMPLES)
    whole = tuple(x.double() if x.is_floating_point() else x for x in batch)
    plain(*whole).backward()
    with engine_of(build("unused").double(), make_config(0, micro=SAMPLES // world_size)) as engine:
        for backward in (engine.backward, Tensor.backward):
            backward(engine(*rank_share(whole, rank, world_size)))
            for (name, param), expected in zip(engine.module.named_parameters(), plain.parameters(), strict=True):
                want = expected.grad if expected.grad is not None else torch.zeros_like(expected)
                torch.testing.assert_close(param.grad, want, rtol=1e-12, atol=1e-14, msg=name)
            engine.zero_grad()
            assert all(param.grad is None for param in engine.module.parameters())
        engine.backward(engine(*rank_share(whole, rank, world_size)))
        engine.step()
        assert all(param.grad is None for param in engine.module.parameters())


def test_stage_0_shows_the_averaged_gradients_of_plain_pytorch_as_param_grad() -> None:
    run_ranks(2, param_grads)


def fp16_backward(rank: int, world_size: int, stage: int) -> None:
    config = make_config(stage, micro=2, fp16={"enabled": True, "loss_scale": 64.0})
    x, y = steps_of("mlp", 1, rank, world_size)[0]
    batch = (x.half(), y.half())
    with engine_of(build("mlp"), config) as engine:
        engine.backward(engine(*batch))
        engine.step()
        norm = engine.get_global_grad_norm()
    with engine_of(build("mlp"), config) as engine:
        engine.scale(engine(*batch)).backward()
        engine.step()
        assert engine.get_global_grad_norm() == norm
        assert engine.loss_scale() == 64.0
        with pytest.raises(
            RuntimeError, match=r"unscaled loss: fp16 needs .*loss scale \(64\)[\s\S]*engine.scale\(loss\)"
        ):
            engine(*batch).backward()


@pytest.mark.parametrize("stage", STAGES)
def test_fp16_takes_scaled_losses_and_refuses_unscaled_ones(stage: int) -> None:
    run_ranks(1, fp16_backward, stage)


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))

    def forward(self, noise: Tensor) -> Tensor:
        return self.net(noise)


class Critic(Generator):
    def __init__(self) -> None:
        super().__init__()
        self.net[2] = nn.Linear(16, 1)


def gan_models() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    return Generator(), Critic()


def gan_losses(generator: Any, critic: Any, noise: Tensor, real: Tensor) -> tuple[Any, Any]:
    return (
        lambda: critic(generator(noise).detach()).square().mean() + (critic(real) - 1).square().mean(),
        lambda: (critic(generator(noise)) - 1).square().mean(),
    )


def gan_of_engines(rank: int, world_size: int, stages: tuple[int, int]) -> list[dict[str, Tensor]]:
    torch.manual_seed(4)
    data = [(torch.randn(4, 8), torch.randn(4, 8)) for _ in range(3)]
    first, second = (make_config(stage, micro=4 // world_size) for stage in stages)
    generator_model, critic_model = gan_models()
    with engine_of(generator_model, first) as generator, engine_of(critic_model, second) as critic:
        for noise, real in data:
            share = rank_share((noise, real), rank, world_size)
            critic_loss, generator_loss = gan_losses(generator, critic, *share)
            critic.backward(critic_loss())
            critic.step()
            generator.backward(generator_loss())
            generator.step()
            critic.zero_grad()
        return [whole_weights(generator), whole_weights(critic)]


@pytest.mark.parametrize("stages", [(0, 0), (1, 2), (2, 3), (3, 3), (3, 0)])
def test_two_engines_train_against_each_other_as_plain_models_do(stages: tuple[int, int]) -> None:
    torch.manual_seed(4)
    data = [(torch.randn(4, 8), torch.randn(4, 8)) for _ in range(3)]
    generator, critic = gan_models()
    generator_optimizer, critic_optimizer = adamw(generator.parameters()), adamw(critic.parameters())
    for noise, real in data:
        for loss, optimizer in zip(
            gan_losses(generator, critic, noise, real), (critic_optimizer, generator_optimizer), strict=True
        ):
            generator.zero_grad()
            critic.zero_grad()
            loss().backward()
            optimizer.step()
    trained = run_ranks(2, gan_of_engines, stages)[0]
    assert_close_weights(trained[0], generator.state_dict())
    assert_close_weights(trained[1], critic.state_dict())


# What can be asked and set. --------------------------------------------------------------------------------------------


def questions(rank: int, world_size: int) -> None:
    config = make_config(1, micro=2, accumulation=2, clip=0.5)
    batch = steps_of("mlp", 1, rank, world_size)[0]
    with engine_of(build("mlp"), config) as engine:
        assert (
            engine.train_batch_size(),
            engine.train_micro_batch_size_per_gpu(),
            engine.gradient_accumulation_steps(),
        ) == (8, 2, 2)
        assert [ask() for ask in engine.get_batch_info()] == [8, 2, 2]
        engine.set_train_batch_size(4)
        assert (engine.train_batch_size(), engine.gradient_accumulation_steps()) == (4, 1)
        with pytest.raises(
            ValueError, match=r"set_train_batch_size\(6\): not a multiple of micro-batch 2 \* 2 ranks = 4"
        ):
            engine.set_train_batch_size(6)
        engine.set_train_micro_batch_size(1)
        assert (engine.train_batch_size(), engine.gradient_accumulation_steps()) == (2, 1)
        assert engine.get_lr() == [LR] and engine.get_mom() == [(0.9, 0.999)]
        assert engine.get_global_grad_norm() is None and not engine.was_step_applied()
        train_step(engine, batch)
        norm = engine.get_global_grad_norm()
        assert isinstance(norm, float) and norm > 0 and engine.was_step_applied()
        answers = {
            "zero_optimization": True,
            "zero_optimization_stage": 1,
            "zero_optimization_partition_gradients": False,
            "zero_optimization_partition_weights": False,
            "fp16_enabled": False,
            "bfloat16_enabled": False,
            "loss_scale": 1.0,
            "dynamic_loss_scale": False,
            "gradient_clipping": 0.5,
            "optimizer_name": "AdamW",
            "scheduler_name": None,
            "steps_per_print": None,
            "get_data_types": (torch.float32, torch.float32),
            "zero_reduce_bucket_size": 600,
            "zero_gather_16bit_weights_on_model_save": False,
        }
        assert {name: getattr(engine, name)() for name in answers} == answers
        assert (engine.dp_world_size, engine.mp_world_size, engine.global_rank, engine.world_size) == (2, 1, rank, 2)
        assert (engine.local_rank, engine.device, engine.skipped_steps) == (rank, torch.device("cpu"), 0)


def test_the_engine_answers_questions_about_batches_rates_norms_and_configuration() -> None:
    run_ranks(2, questions)


def norm_is_whole(rank: int, world_size: int, stage: int) -> float:
    with engine_of(build("mlp"), make_config(stage, micro=SAMPLES // world_size, clip=1e-3)) as engine:
        train_step(engine, steps_of("mlp", 1, rank, world_size)[0])
        return float(engine.get_global_grad_norm())


@pytest.mark.parametrize("stage", STAGES)
def test_the_global_norm_is_that_of_the_whole_gradient_before_clipping(stage: int) -> None:
    model = build("mlp")
    model(*steps_of("mlp", 1)[0]).backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
    assert run_ranks(2, norm_is_whole, stage) == pytest.approx([expected] * 2, rel=1e-5)


# What integrations rely on. --------------------------------------------------------------------------------------------


class WithExtras(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 1)
        self.purpose = "tests"

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).mean()

    def generate(self) -> str:
        return "text"


def surface(rank: int, world_size: int) -> None:
    config = {**make_config(2, micro=1), "steps_per_print": float("inf")}
    before = repr(config)
    model = WithExtras()
    with small_units():
        engine, optimizer, loader, scheduler = deepspeed.initialize(
            model=model, config_params=config, model_parameters=model.parameters()
        )
    assert type(engine) is deepspeed.DeepSpeedEngine and engine.module is model
    assert engine.config is config and repr(config) == before
    assert engine.optimizer is optimizer and (loader, scheduler) == (None, None)
    assert isinstance(optimizer, deepspeed.DeepSpeedOptimizer) and isinstance(
        optimizer.optimizer, torch.optim.Optimizer
    )
    assert engine.train() is None and engine.training and engine.eval() is None and not model.training
    assert engine.generate() == "text" and engine.purpose == "tests"
    with pytest.raises(AttributeError, match="neither DeepSpeedEngine nor WithExtras has 'purpos'"):
        engine.purpos  # noqa: B018
    assert "exclude_frozen_parameters" in inspect.signature(engine.save_checkpoint).parameters
    assert [hasattr(engine, name) for name in ("param_groups", "defaults", "state")] == [False] * 3
    assert mock.Mock(spec=deepspeed.DeepSpeedEngine).no_sync() is not None
    engine.lr_scheduler = None
    train_step(engine, (torch.ones(1, 4),))
    assert optimizer.overflow is False
    assert "set_to_none" in inspect.signature(optimizer.zero_grad).parameters
    optimizer.param_groups = optimizer.param_groups
    optimizer.__class__ = type("FabricZeroOptimizer", (type(optimizer),), {})
    train_step(engine, (torch.ones(1, 4),))
    engine.destroy()


def generated_groups(rank: int, world_size: int) -> list[tuple[float, int]]:
    """Learning rates and sizes of groups that come from generators, as are their parameters."""
    model = WithExtras()
    groups = ({"params": (p for p in (param,)), "lr": 0.25} for param in model.parameters())
    with small_units():
        engine = deepspeed.initialize(model=model, config=make_config(0, micro=1), model_parameters=groups)[0]
    found = [(group["lr"], len(group["params"])) for group in engine.optimizer.param_groups]
    engine.destroy()
    return found


def test_parameters_and_groups_may_come_from_generators() -> None:
    assert run_ranks(2, generated_groups) == [[(0.25, 1)] * 2] * 2


def test_the_engine_and_optimizer_have_the_surface_integrations_use() -> None:
    run_ranks(2, surface)


def lightning(rank: int, world_size: int, stage: int) -> dict[str, Tensor]:
    """As Lightning calls: own namespace, a filter iterator, a scheduler of its own; and an engine for inference."""
    args = Namespace(device_rank=rank)
    model = build("frozen")
    trained = filter(lambda p: p.requires_grad, model.parameters())
    optimizer = adamw(p for p in model.parameters() if p.requires_grad)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    kwargs = {
        "args": args,
        "model_parameters": trained,
        "optimizer": optimizer,
        "lr_scheduler": scheduler,
        "dist_init_required": False,
    }
    config = make_config(stage, micro=SAMPLES // world_size)
    del config["optimizer"]
    with engine_of(model, config, **kwargs) as engine:
        engine.lr_scheduler = None
        for batch in steps_of("frozen", 3, rank, world_size):
            train_step(engine, batch)
        weights = whole_weights(engine)
    inference = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage if stage == 3 else 0}}
    with (
        engine_of(model, inference, args=args, model_parameters=[], dist_init_required=False) as engine,
        torch.no_grad(),
    ):
        assert engine.optimizer is None or stage == 3
        engine(*steps_of("frozen", 1, rank, world_size)[0])
    return weights


@pytest.mark.parametrize("stage", STAGES)
def test_lightning_s_calls_train_and_then_evaluate(stage: int) -> None:
    batches = make_batches(build("frozen"), num_steps=3, accumulation=1, samples=SAMPLES)
    expected = train_plain(build("frozen"), batches, adamw).weights
    assert_close_weights(run_ranks(2, lightning, stage)[0], expected)


def evaluation_engine(rank: int, world_size: int, stage: int) -> None:
    """TRL's reference model: dotted keys at the top, neither optimizer nor scheduler."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": world_size,
        "zero_optimization": {"stage": stage},
        "zero_optimization.reduce_bucket_size": 256.0,
        "zero_optimization.stage3_param_persistence_threshold": 160,
        "zero_optimization.stage3_prefetch_bucket_size": 230.4,
    }
    batch = steps_of("mlp", 1, rank, world_size)[0]
    expected = build("mlp")(*batch)
    with engine_of(build("mlp"), config) as engine:
        engine.eval()
        with torch.no_grad():
            torch.testing.assert_close(engine(*batch), expected)
        with pytest.raises(TrainingStateError, match='no optimizer.*\n.*add an "optimizer" section'):
            engine.backward(engine(*batch))
        with pytest.raises(AssertionError, match="no optimizer, it can only evaluate"):
            engine.step()


@pytest.mark.parametrize("stage", [0, 3])
def test_an_engine_without_optimizer_evaluates_and_refuses_to_train(stage: int) -> None:
    run_ranks(2, evaluation_engine, stage)


def without_a_launcher() -> list[float]:
    engine, *_ = deepspeed.initialize(model=build("mlp"), config=make_config(2, micro=SAMPLES))
    losses = [train_step(engine, batch).item() for batch in steps_of("mlp", 3)]
    assert (engine.world_size, engine.global_rank, engine.local_rank) == (1, 0, 0)
    return losses


def test_one_process_trains_without_any_launcher() -> None:
    batches = make_batches(build("mlp"), num_steps=3, accumulation=1, samples=SAMPLES)
    assert run_alone(without_a_launcher) == pytest.approx(train_plain(build("mlp"), batches, adamw).losses, rel=1e-5)


def test_the_data_parallel_groups_are_reachable() -> None:
    run_ranks(2, groups_and_comm)


def groups_and_comm(rank: int, world_size: int) -> None:
    from deepspeed.utils import groups

    with engine_of(build("mlp"), make_config(1, micro=1)):
        assert groups._get_data_parallel_rank() == rank and groups._get_data_parallel_world_size() == 2
        assert torch.distributed.get_process_group_ranks(groups._get_data_parallel_group()) == [0, 1]
        assert (groups._get_sequence_parallel_rank(), groups._get_sequence_parallel_world_size()) == (0, 1)
        assert groups.get_model_parallel_world_size() == 1
        with pytest.raises(DeepSpeedError, match="Pass ep_size"):
            groups.initialize(ep_size=2)
    tensor = torch.full((2,), float(rank + 1))
    deepspeed.comm.all_reduce(tensor)
    assert tensor.tolist() == [3.0, 3.0]
    assert (deepspeed.comm.get_rank(), deepspeed.comm.get_world_size(), deepspeed.comm.is_initialized()) == (
        rank,
        2,
        True,
    )


def save_and_compare(rank: int, world_size: int, stage: int, folder: str) -> bool:
    config = make_config(stage, micro=1, zero={"stage3_gather_16bit_weights_on_model_save": True})
    with engine_of(build("gpt_tied"), config) as engine:
        assert engine.save_16bit_model(folder)
        expected = engine._zero3_consolidated_16bit_state_dict()
    written = torch.load(f"{folder}/pytorch_model.bin", weights_only=True)
    return rank > 0 or all(torch.equal(written[name], value) for name, value in (expected or {}).items())


@pytest.mark.parametrize("stage", [0, 3])
def test_save_16bit_model_writes_whole_weights(stage: int, tmp_path: pathlib.Path) -> None:
    assert all(run_ranks(2, save_and_compare, stage, str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]


def save_without_leave(rank: int, world_size: int, folder: str) -> bool:
    with engine_of(build("gpt_tied"), make_config(3, micro=1)) as engine:
        return engine.save_16bit_model(folder)


def test_save_16bit_model_at_stage_3_writes_nothing_unless_gathering_is_allowed(tmp_path: pathlib.Path) -> None:
    assert run_ranks(2, save_without_leave, str(tmp_path)) == [False, False]
    assert not list(tmp_path.iterdir())


def without_gc(rank: int, world_size: int) -> tuple[bool, int]:
    try:
        with engine_of(build("mlp"), make_config(1, micro=1, disable_python_gc=True)) as engine:
            return gc.isenabled(), engine.collect_python_gc()
    finally:
        gc.enable()


def test_disable_python_gc_leaves_collecting_to_the_caller() -> None:
    ((is_enabled, found),) = run_ranks(1, without_gc)
    assert not is_enabled
    assert found >= 0


def set_the_switches() -> None:
    config = {"train_batch_size": 1, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    engine = deepspeed.initialize(model=torch.nn.Linear(2, 2), config=config)[0]
    for name in ("enable_backward_allreduce", "pipeline_enable_backward_allreduce"):
        setattr(engine, name, True)
        with pytest.raises(TrainingStateError, match=r"enable_backward_allreduce = False.*\n.*no_sync"):
            setattr(engine, name, False)
    engine.destroy()


def test_a_switch_that_the_optimizer_has_is_no_scripts_to_set() -> None:
    run_alone(set_the_switches)
