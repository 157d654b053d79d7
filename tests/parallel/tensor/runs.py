"""Runs on ranks that share layers, for the tests; each compares with plain PyTorch in its own process."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.memory.measure import measure_peak
from deepspeed.mesh import marks
from deepspeed.parallel.tensor.apply import carry_out, draw
from deepspeed.parallel.tensor.choose import PLAN, Wishes, require_found
from deepspeed.parallel.tensor.collectives import TensorGroup
from deepspeed.parallel.tensor.inputs import INCONSISTENT
from deepspeed.parallel.tensor.layers import part_of
from tests.parallel.tensor.models import batch, share, small
from tests.parallel.tensor.plans import on_meta


def config(tp: int, stage: int = 0, **more: Any) -> dict[str, Any]:
    """A configuration for fp32 training."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "tensor_parallel": {"autotp_size": tp},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        **more,
    }


def part(whole: Tensor, param: nn.Parameter) -> Tensor:
    """What a rank should hold of a whole tensor, by the parameter's mark."""
    for cut in marks.of(param).cuts:
        whole = torch.cat([whole.narrow(cut.dim, a, b - a) for a, b in cut.ranges], dim=cut.dim)
    return whole


def plain_step(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[float, dict[str, Tensor], float]:
    """Loss, gradients and their norm in one process."""
    loss = model(**inputs).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.linalg.vector_norm(torch.stack([g.double().norm() for g in grads.values()]))
    return float(loss.detach()), grads, float(norm)


def error(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert got.shape == want.shape, f"{tuple(got.shape)}, expected {tuple(want.shape)}"
    return float((got.float() - want).abs().max() / want.abs().max().clamp(min=1e-12)) if want.numel() else 0.0


def compare(
    rank: int, world_size: int, family: str, tp: int, stage: int, changes: dict[str, Any], section: Any = ()
) -> dict[str, float]:
    """Loss, gradients, norm against one process; the largest errors. `section`: more of tensor_parallel."""
    dp = world_size // tp
    oracle, inputs = small(family, **changes), batch(2 * dp)
    loss, grads, norm = plain_step(oracle, inputs)
    model = small(family, **changes)
    asked = config(tp, stage)
    asked["tensor_parallel"].update(section)
    engine, *_ = deepspeed.initialize(model=model, config=asked)
    output = engine(**share(inputs, rank // tp, dp))
    if "vocab_parallel_lm_head" in asked["tensor_parallel"]:
        whole, parts = model.config.vocab_size, [None] * tp
        torch.distributed.all_gather_object(parts, output.logits.shape[-1])
        assert sum(parts) == whole and output.logits.shape[-1] < whole, parts  # type: ignore[arg-type]
    own = output.loss
    mean = own.detach().clone()
    torch.distributed.all_reduce(mean)
    engine.backward(own)
    found = {"loss": abs(float(mean) / world_size - loss) / abs(loss), "cut": 0.0, "grad": 0.0}
    largest = max(float(grad.abs().max()) for grad in grads.values())
    for name, param in engine.module.named_parameters():
        got = deepspeed.utils.safe_get_full_grad(param)
        if name in grads:
            want = part(grads[name], param)
            if name.endswith(
                "k_proj.bias"
            ):  # drops out of a softmax: zero but for rounding, which has no relative error
                assert (got.float() - want).abs().max() < 1e-5 * largest, name
            else:
                found["grad"] = max(found["grad"], error(got, want))
        found["cut"] += bool(marks.of(param).cuts)
    engine.step()
    found["norm"] = abs(engine.get_global_grad_norm() - norm) / norm
    engine.destroy()
    return found


def train(rank: int, world_size: int, family: str, tp: int, stage: int, more: dict[str, Any], steps: int = 3) -> Any:
    """Losses and this rank's weights after some steps."""
    dp = world_size // tp
    engine, *_ = deepspeed.initialize(model=small(family), config=config(tp, stage, **more))
    losses = []
    for step in range(steps):
        loss = engine(**share(batch(2 * dp, seed=step), rank // tp, dp)).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    weights = {n: deepspeed.utils.safe_get_full_fp32_param(p).clone() for n, p in engine.module.named_parameters()}
    engine.destroy()
    return losses, weights


def read_different_data(rank: int, world_size: int) -> None:
    engine, *_ = deepspeed.initialize(model=small("llama"), config=config(2))
    with pytest.raises(AssertionError, match=f"^{INCONSISTENT}$"):
        engine(**batch(2, seed=rank))
    engine.destroy()


def optimizer_first(rank: int, world_size: int, stage: int, tp: int) -> None:
    """An optimizer that was made before, and has stepped twice: its states go on with the parts."""
    model = small("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    plain_steps(model, optimizer, 2)
    told = {key: value for key, value in config(tp, stage).items() if key != "optimizer"}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, model_parameters=list(model.parameters()), config=told
    )
    losses = []
    for _ in range(3):
        loss = engine(**batch(2)).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    engine.destroy()
    plain = small("llama")
    assert losses == pytest.approx(plain_steps(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2), 5)[2:], rel=1e-5)


def plain_steps(model: nn.Module, optimizer: torch.optim.Optimizer, num: int) -> list[float]:
    """The losses of some steps of plain PyTorch on one batch."""
    losses = []
    for _ in range(num):
        loss = model(**batch(2)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def compare_under_init(rank: int, world_size: int) -> dict[str, float]:
    loss, _, norm = plain_step(small("llama"), batch(2))
    with deepspeed.zero.Init(config_dict_or_path=config(2, 3)):
        model = small("llama")
    engine, *_ = deepspeed.initialize(model=model, config=config(2, 3))
    own = engine(**batch(2)).loss
    engine.backward(own)
    engine.step()
    found = {"loss": abs(float(own.detach()) - loss) / loss, "norm": abs(engine.get_global_grad_norm() - norm) / norm}
    engine.destroy()
    return {**found, "cut": 1.0, "grad": 0.0}


class _CutError(Exception):
    """The layers are cut; what comes then is not looked at."""


def peaks_of_building(rank: int, world_size: int) -> tuple[float, float]:
    """The peaks of a rank that builds a model under zero.Init and cuts it, and of all of `initialize`, in parts of the model."""
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "head_dim": 32}
    whole = sum(p.numel() for p in small("llama", **sizes).parameters()) * 4
    asked = config(world_size, 3)
    engines = []

    def build() -> None:
        with deepspeed.zero.Init(config_dict_or_path=asked):
            model = small("llama", **sizes)
        with patch(
            "deepspeed.zero.plan.MIN_UNIT_NUMEL", 1 << 14
        ):  # a bucket is there twice while it is filled: small ones, as of more layers
            engines.append(deepspeed.initialize(model=model, config=asked)[0])

    def cut() -> None:
        with pytest.raises(_CutError), patch("deepspeed.engine.build.build", side_effect=_CutError):
            build()

    peaks = measure_peak(cut).allocated_nbytes / whole, measure_peak(build).allocated_nbytes / whole
    engines[0].destroy()
    return peaks


QKV_AND_ROWS = ("q_proj", "v_proj", "o_proj", "down_proj")


def compare_adapters(
    rank: int,
    world_size: int,
    stage: int = 2,
    targets: tuple[str, ...] = QKV_AND_ROWS,
    changes: dict[str, Any] | None = None,
) -> None:
    """LoRA on columns and rows: loss, gradients and norm of one step."""
    import peft

    def adapted() -> nn.Module:
        torch.manual_seed(0)
        asked = peft.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False, lora_dropout=0.0)
        return peft.get_peft_model(small("llama", **(changes or {})), asked)

    loss, grads, norm = plain_step(adapted(), batch(2))
    engine, *_ = deepspeed.initialize(model=adapted(), config=config(world_size, stage))
    own = engine(**batch(2)).loss
    engine.backward(own)
    for name, param in engine.module.named_parameters():
        if name in grads:
            assert error(deepspeed.utils.safe_get_full_grad(param), part(grads[name], param)) < 1e-5, name
    engine.step()
    assert float(own.detach()) == pytest.approx(loss, rel=1e-6)
    assert engine.get_global_grad_norm() == pytest.approx(norm, rel=1e-6)
    engine.destroy()


def compare_checkpointed(rank: int, world_size: int) -> None:
    loss, _, norm = plain_step(small("llama"), batch(2))
    model = small("llama")
    model.gradient_checkpointing_enable()
    model.train()
    engine, *_ = deepspeed.initialize(model=model, config=config(2, 3))
    own = engine(**batch(2)).loss
    engine.backward(own)
    engine.step()
    assert float(own.detach()) == pytest.approx(loss, rel=1e-6)
    assert engine.get_global_grad_norm() == pytest.approx(norm, rel=1e-6)
    engine.destroy()


def count_bytes(rank: int, world_size: int, num_layers: int, section: dict[str, Any]) -> int:
    """What one rank sends in a forward and a backward of 2 x 8 tokens."""
    model = small("llama", num_hidden_layers=num_layers, num_key_value_heads=4)  # none is copied: copies send gradients
    asked = config(world_size)
    asked["tensor_parallel"].update(section)
    engine, *_ = deepspeed.initialize(model=model, config=asked)
    ranks = part_of(model.model.layers[0].mlp.down_proj).ranks
    before = ranks.num_sent_bytes
    engine.backward(engine(**batch(2)).loss)
    engine.step()
    engine.destroy()
    return ranks.num_sent_bytes - before


def train_long(rank: int, world_size: int, steps: int) -> dict[str, Tensor]:
    """The parameters that are not cut, after some steps."""
    engine, *_ = deepspeed.initialize(model=small("qwen3"), config=config(world_size, 2))
    for step in range(steps):
        engine.backward(engine(**batch(2, length=4, seed=step % 7)).loss)
        engine.step()
    whole = {n: p.detach().clone() for n, p in engine.module.named_parameters() if not marks.of(p).cuts}
    engine.destroy()
    return whole


def apply_plans(rank: int, world_size: int, names: list[str]) -> dict[str, str]:
    """By family, what went wrong: a refusal, or an entry of the plan that has no effect."""
    group = TensorGroup(torch.distributed.group.WORLD, rank, world_size)
    wrong = {}
    for name in names:
        try:
            model = on_meta(name)
            chosen, drawn = draw(model, group, Wishes())
            require_found(model, [chosen])
            carry_out(model, group, drawn, lambda param: None)
            if chosen.source != PLAN:
                wrong[name] = f"by its {chosen.source}"
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {error}"
    return wrong
