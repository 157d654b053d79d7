"""1-bit optimizers under the engine: the bits of a simulation in one process, at every stage they go with."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import deepspeed
from deepspeed.utils.errors import DeepSpeedConfigError, RankMismatchError
from tests.engine.runs import EPS, LONG, LR, engine_of, long_but, make_config, train, whole_weights
from tests.harness import run_ranks
from tests.models import build, make_batches, rank_share, total_loss
from tests.optim.onebit_oracle import Simulated, onebit_adam, onebit_lamb, zero_one_adam

SAMPLES = 6
FREEZE = 3


def config_of(stage: int, world_size: int, accumulation: int = 1, **extra: Any) -> dict[str, Any]:
    params = {"lr": LR, "eps": EPS, "weight_decay": 0.01, "freeze_step": FREEZE, "comm_backend_name": "gloo"}
    config = make_config(stage, micro=SAMPLES // world_size, accumulation=accumulation, **extra)
    return {**config, "optimizer": {"type": "OneBitAdam", "params": params}}


@functools.lru_cache(maxsize=None)
def simulated(name: str, world_size: int, accumulation: int, num_steps: int) -> Simulated:
    model = build(name)
    batches = make_batches(model, num_steps=num_steps, accumulation=accumulation, samples=SAMPLES)
    return onebit_adam(model, batches, world_size, freeze_step=FREEZE, lr=LR, eps=EPS, weight_decay=0.01)


@pytest.mark.parametrize(
    ("stage", "world_size", "accumulation"),
    long_but(
        [(0, 1, 1), (0, 2, 2), (1, 3, 1)],
        [(stage, *rest) for stage in (0, 1) for rest in ((1, 1), (2, 1), (2, 2), (3, 1))],
    ),
)
def test_onebit_adam_has_the_bits_of_a_simulation_in_one_process(
    stage: int, world_size: int, accumulation: int
) -> None:
    run, *_ = run_ranks(world_size, train, "gpt_tied", config_of(stage, world_size, accumulation), num_steps=8)
    expected = simulated("gpt_tied", world_size, accumulation, 8)
    assert run.losses == pytest.approx(expected.losses, rel=1e-6)
    for name, param in expected.params.items():
        assert torch.equal(run.weights[name], param.detach()), name


LOCAL = {"var_freeze_step": 4, "var_update_scaler": 2, "local_step_scaler": 2, "local_step_clipper": 4}
"""v is updated in steps 1, 2, 4; then averages come every 1, 2, 4 steps: in 5, 6, 8, 12."""


def other_config(kind: str, stage: int, world_size: int, **params: Any) -> dict[str, Any]:
    config = config_of(stage, world_size)
    settings = {"lr": LR, "eps": EPS, "weight_decay": 0.01, **params}
    return {**config, "optimizer": {"type": kind, "params": settings}}


@pytest.mark.parametrize(
    ("stage", "world_size"), long_but([(1, 2)], [(stage, size) for stage in (0, 1) for size in (1, 2, 3)])
)
def test_zero_one_adam_has_the_bits_of_a_simulation_in_one_process(stage: int, world_size: int) -> None:
    config = other_config("ZeroOneAdam", stage, world_size, **LOCAL)
    run, *_ = run_ranks(world_size, train, "gpt_tied", config, num_steps=12)
    model = build("gpt_tied")
    batches = make_batches(model, num_steps=12, accumulation=1, samples=SAMPLES)
    expected = zero_one_adam(
        model, batches, world_size, full_steps=(1, 2, 4), freeze_step=4, average_steps=(5, 6, 8, 12), lr=LR, eps=EPS,
        weight_decay=0.01,
    )  # fmt: skip
    for name, param in expected.params.items():
        assert torch.equal(run.weights[name], param.detach()), name


@pytest.mark.parametrize(("stage", "world_size"), long_but([(0, 2), (1, 3)], [(0, 1), (0, 2), (1, 2), (1, 3)]))
def test_onebit_lamb_has_the_weights_of_a_simulation_in_one_process(stage: int, world_size: int) -> None:
    config = other_config("OneBitLamb", stage, world_size, freeze_step=FREEZE)
    config["zero_optimization"]["reduce_bucket_size"] = 10**6
    run, *_ = run_ranks(world_size, train, "mlp", config, num_steps=8)
    model = build("mlp")
    batches = make_batches(model, num_steps=8, accumulation=1, samples=SAMPLES)
    # Buckets hold parameters in reverse order of registration, and so does the one buffer that is compressed.
    backwards = lamb_order(model)
    expected = onebit_lamb(backwards, batches, world_size, freeze_step=FREEZE, lr=LR, eps=EPS, weight_decay=0.01)
    for name, param in expected.params.items():
        assert torch.equal(run.weights[name], param.detach()), name


def lamb_order(model: Any) -> Any:
    """The model, whose `named_parameters` come backwards."""
    forwards = list(model.named_parameters())
    kind = type(model)
    model.__class__ = type(kind.__name__, (kind,), {"named_parameters": lambda self, *a, **k: [
        (name, dict(kind.named_parameters(self))[name]) for name, _ in reversed(forwards)
    ]})  # fmt: skip
    return model


def steps(engine: Any, batches: list[Any], rank: int, world_size: int, dtype: torch.dtype = torch.float32) -> None:
    for micro_batches in batches:
        for x, y in micro_batches:
            x, y = rank_share((x, y), rank, world_size)
            x = x.to(dtype) if x.is_floating_point() else x
            engine.backward(total_loss(engine(x, y)))
            engine.step()


def resumed(rank: int, world_size: int, config: dict[str, Any], folder: str, before: int) -> dict[str, Any]:
    """Weights after 8 steps in one go, and after a save, another engine and a load in between."""
    model = build("gpt_tied")
    batches = make_batches(model, num_steps=8, accumulation=1, samples=SAMPLES)
    found = {}
    with engine_of(build("gpt_tied"), config) as engine:
        steps(engine, batches, rank, world_size)
        found["uninterrupted"] = whole_weights(engine)
    with engine_of(build("gpt_tied"), config) as engine:
        steps(engine, batches[:before], rank, world_size)
        engine.save_checkpoint(folder)
    with engine_of(build("gpt_tied", seed=5), config) as engine:
        engine.load_checkpoint(folder)
        inner = engine.optimizer.optimizer
        keys = [
            getattr(inner, key) for key in ("adam_freeze_key", "lamb_freeze_key", "freeze_key") if hasattr(inner, key)
        ]
        assert keys == [before >= FREEZE]
        # 0/1 Adam compresses gradients too, in steps that do not update v: the third is the first of them.
        assert engine.enable_backward_allreduce == (before < (2 if hasattr(inner, "var_freeze_step") else FREEZE))
        steps(engine, batches[before:], rank, world_size)
        found["resumed"] = whole_weights(engine)
    return found


KINDS = {
    "OneBitAdam": {"freeze_step": FREEZE},
    "OneBitLamb": {"freeze_step": FREEZE},
    "ZeroOneAdam": {**LOCAL, "var_freeze_step": 3},
}


@pytest.mark.parametrize(
    ("kind", "stage", "before"),
    long_but(
        [("OneBitAdam", 0, 5), ("OneBitAdam", 1, 2), ("OneBitLamb", 1, 5), ("ZeroOneAdam", 1, 6)],
        [("OneBitAdam", 0, 2), ("OneBitAdam", 0, 5), ("OneBitAdam", 1, 2), ("OneBitAdam", 1, 5),
         ("OneBitLamb", 0, 5), ("OneBitLamb", 1, 2), ("OneBitLamb", 1, 5), ("ZeroOneAdam", 0, 2), ("ZeroOneAdam", 0, 6),
         ("ZeroOneAdam", 1, 6)],
    ),
)  # fmt: skip
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(kind: str, stage: int, before: int, tmp_path: Path) -> None:
    config = other_config(kind, stage, 2, **KINDS[kind])
    found, *_ = run_ranks(2, resumed, config, str(tmp_path), before)
    for name, weight in found["uninterrupted"].items():
        assert torch.equal(weight, found["resumed"][name]), name


def on_other_ranks(rank: int, world_size: int, folder: str, saves: bool) -> bool:
    batches = make_batches(build("mlp"), num_steps=7, accumulation=1, samples=SAMPLES)
    with engine_of(build("mlp"), config_of(1, world_size)) as engine:
        if saves:
            steps(engine, batches[:5], rank, world_size)
            engine.save_checkpoint(folder)
        else:
            engine.load_checkpoint(folder)
            steps(engine, batches[5:], rank, world_size)
        return bool(engine.optimizer.optimizer.adam_freeze_key)


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    run_ranks(2, on_other_ranks, str(tmp_path), True)
    assert all(run_ranks(3, on_other_ranks, str(tmp_path), False))


def low_precision(rank: int, world_size: int, config: dict[str, Any]) -> dict[str, Any]:
    dtype = torch.bfloat16 if "bf16" in config else torch.float16
    batches = make_batches(build("mlp"), num_steps=6, accumulation=1, samples=SAMPLES)
    with engine_of(build("mlp"), config) as engine:
        steps(engine, batches, rank, world_size, dtype)
        state = next(iter(engine.optimizer.state.values()))
        return {
            "weights": whole_weights(engine),
            "keys": set(state),
            "step": state["step"],
            "dtype": state["exp_avg"].dtype,
            "skipped": engine.skipped_steps,
        }


BF16, FP16 = {"bf16": {"enabled": True}}, {"fp16": {"enabled": True, "loss_scale": 64}}


@pytest.mark.parametrize(
    ("stage", "precision"),
    long_but([(0, FP16), (1, BF16)], [(stage, precision) for stage in (0, 1) for precision in (BF16, FP16)]),
)
def test_low_precision_keeps_fp32_states_and_equal_weights_on_all_ranks(stage: int, precision: dict[str, Any]) -> None:
    first, second = run_ranks(2, low_precision, config_of(stage, 2, **precision))
    assert first["dtype"] is torch.float32
    assert (first["step"], first["skipped"]) == (6, 0)
    private = {"worker_error", "server_error"} if stage == 0 else set()
    assert first["keys"] == {"step", "exp_avg", "exp_avg_sq"} | private
    assert all(
        torch.equal(value, second["weights"][name]) for name, value in first["weights"].items() if second["weights"]
    )
    assert all(value.isfinite().all() for value in first["weights"].values())


def after_the_freeze_with_a_bad_gradient(rank: int, world_size: int, stage: int) -> tuple[int, bool, Any, str]:
    from deepspeed.utils import logging

    said: list[str] = []
    batches = make_batches(build("mlp"), num_steps=6, accumulation=1, samples=SAMPLES)
    with engine_of(build("mlp"), config_of(stage, world_size)) as engine, pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.logger, "warning", lambda text, *args, **kwargs: said.append(str(text) % args))
        steps(engine, batches[:4], rank, world_size)
        if rank == 1:
            batches[4][0][0][:] = torch.nan
        steps(engine, batches[4:], rank, world_size)
        finite = all(bool(value.isfinite().all()) for value in whole_weights(engine).values())
        return engine.skipped_steps, finite, engine.get_global_grad_norm(), "\n".join(said)


@pytest.mark.parametrize("stage", [pytest.param(0, marks=LONG), 1])
def test_a_step_with_nan_on_one_rank_is_skipped_on_all_named_and_the_errors_stay_clean(stage: int) -> None:
    for skipped, is_finite, norm, said in run_ranks(2, after_the_freeze_with_a_bad_gradient, stage):
        assert (skipped, is_finite) == (1, True)
        assert re.search(r"the step is skipped, since .*: \[rank 1\] the gradient of \S+ has nan", said), said
        assert norm == norm


def states_by_parameter(rank: int, world_size: int) -> None:
    from deepspeed.runtime.fp16.onebit import OnebitLamb

    model = build("mlp")
    optimizer = OnebitLamb(model.parameters(), lr=LR, freeze_step=1)
    config = {key: value for key, value in config_of(0, world_size).items() if key != "optimizer"}
    with engine_of(model, config, optimizer=optimizer) as engine:
        steps(engine, make_batches(model, num_steps=2, accumulation=1, samples=SAMPLES), rank, world_size)
        for param in model.parameters():
            assert param in optimizer.state
            state = optimizer.state[param]
            assert {"step", "exp_avg", "exp_avg_sq", "scaling_coeff", "lamb_coeff_freeze", "last_factor"} <= set(state)
            assert state["exp_avg"].shape == param.shape
        assert len(optimizer.state) == len(list(model.parameters())), "asking adds nothing"
        assert engine.optimizer.lamb_freeze_key is True
        assert engine.optimizer.get_lamb_coeffs() == optimizer.get_lamb_coeffs() != []
        with pytest.raises(AttributeError, match="adam_freeze_key"):
            _ = engine.optimizer.adam_freeze_key


def test_states_are_found_by_parameter_and_flags_on_the_engines_optimizer() -> None:
    run_ranks(2, states_by_parameter)


def unsettled(rank: int, world_size: int) -> list[str]:
    from deepspeed.runtime.fp16.onebit import OnebitAdam, OnebitLamb, ZeroOneAdam
    from deepspeed.utils import logging

    said: list[str] = []
    logging.warn_once.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.logger, "warning", lambda message, *args, **kwargs: said.append(str(message)))
        params = [torch.nn.Parameter(torch.ones(8))]
        OnebitAdam(params, freeze_step=60)
        ZeroOneAdam(params, var_freeze_step=60, betas=(0.9, 0.95))
        OnebitLamb(params, freeze_step=60)
        OnebitLamb(params, freeze_step=60, betas=(0.9, 0.95), factor_max=1.0, factor_min=1.0)
        OnebitLamb(params, freeze_step=60, betas=(0.9, 0.95))
    return said


def test_a_variance_that_has_not_settled_or_is_noise_is_one_warning_for_the_optimizer_that_minds() -> None:
    of_adam, of_lamb = unsettled(0, 1)
    assert "OnebitAdam: freeze_step = 60, but with betas[1] = 0.999 the variance needs about 1000 steps" in of_adam
    assert "OnebitLamb: betas[1] = 0.95 remembers about 20 steps" in of_lamb
    assert of_lamb.endswith("Set betas[1] to 0.999, or factor_max and factor_min to 1.")


def settings_differ(rank: int, world_size: int) -> None:
    from deepspeed.runtime.fp16.onebit.adam import OnebitAdam

    model = build("mlp")
    optimizer = OnebitAdam(model.parameters(), lr=LR, freeze_step=2 + rank)
    config = {key: value for key, value in config_of(0, world_size).items() if key != "optimizer"}
    with pytest.raises(
        DeepSpeedConfigError, match=r"OnebitAdam: ranks differ in freeze_step: 2 on rank 0, 3 on rank 1"
    ):
        deepspeed.initialize(model=model, config=config, optimizer=optimizer)


def test_ranks_with_different_freeze_steps_are_told_before_they_wait_for_each_other() -> None:
    run_ranks(2, settings_differ)


def alone(rank: int, world_size: int) -> None:
    """Stepped by the script, without an engine."""
    from deepspeed.runtime.fp16.onebit import OnebitAdam, OnebitLamb, ZeroOneAdam
    from deepspeed.utils import logging

    for make in (OnebitAdam, OnebitLamb, ZeroOneAdam):
        name = "var_freeze_step" if make is ZeroOneAdam else "freeze_step"
        param = torch.nn.Parameter(torch.ones(40))
        optimizer = make([param], lr=LR, betas=(0.9, 0.5), **{name: 2 + rank})
        param.grad = torch.ones(40)
        with pytest.raises(RankMismatchError, match=rf"rank 1 has {{'{name}': 3}} where rank 0 has {{'{name}': 2}}"):
            optimizer.step()
        said: list[str] = []
        optimizer = make([param], lr=LR, betas=(0.9, 0.5), **{name: 2})
        for step in range(5):
            before = param.detach().clone()
            param.grad = torch.full((40,), torch.nan if (rank, step) == (1, 3) else 1.0)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(logging.logger, "warning", lambda text, *args, said=said: said.append(str(text) % args))
                optimizer.step()
            assert torch.equal(param, before) == (step == 3), (make, step)
        assert param.isfinite().all()
        if rank == 1:
            told = "[rank 1] the step is skipped on all ranks: the gradient of parameter 0, of shape (40,), has nan"
            assert said == [told]


def test_an_optimizer_without_an_engine_names_settings_that_differ_and_skips_what_is_not_finite() -> None:
    run_ranks(2, alone)


def sharded_too_far(rank: int, world_size: int, stage: int) -> None:
    from deepspeed.runtime.fp16.onebit import OnebitAdam

    model = build("mlp")
    config = {key: value for key, value in config_of(stage, world_size).items() if key != "optimizer"}
    with pytest.raises(DeepSpeedConfigError, match=r"a rank keeps a slice of the gradients[^@]*Use stage 0 or 1"):
        deepspeed.initialize(model=model, config=config, optimizer=OnebitAdam(model.parameters()))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_stage_that_does_not_go_with_it_is_refused_with_the_reason(stage: int) -> None:
    run_ranks(2, sharded_too_far, stage)
