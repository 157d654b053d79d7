"""Predictions against the allocator of real engines, and against their buckets."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.activation.blocks import Recompute, checkpoint_blocks
from deepspeed.assembly import assemble
from deepspeed.comm.exchange import Pending
from deepspeed.config import load_config
from deepspeed.memory.estimator import Estimator
from deepspeed.memory.ledger import Ledger, granted
from deepspeed.memory.measure import measure_peak
from deepspeed.memory.replay import LIKELY_IN_FLIGHT_DIRECTLY
from deepspeed.memory.sizes import sizes_of
from deepspeed.memory.trace import TraceError, What, own_memory, trace_step
from deepspeed.zero.plan import plan_model
from deepspeed.zero.policy import Tier
from deepspeed.zero.reduce import Limit
from deepspeed.zero.tiers_from_config import make_placing
from tests.engine.runs import engine_of, make_config, small_units
from tests.harness import run_ranks
from tests.models import MODELS, WithFrozen, build, example_module, total_loss

MICRO, SEQ, WIDTH, LAYERS = 24, 64, 192, 4
WORLD_SIZE = 2


def gpt() -> nn.Module:
    example = example_module()
    return example.Gpt(example.GptConfig(width=WIDTH, layers=LAYERS, heads=3, seq=SEQ))


def config_of(stage: int, precision: str, recompute: str, offload: str, folder: Path | str) -> dict[str, Any]:
    device: dict[str, Any] = {"device": offload, **({"nvme_path": str(folder)} if offload == "nvme" else {})}
    zero = {
        "reduce_bucket_size": 50_000,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
        **({"offload_optimizer": device} if offload != "device" else {}),
    }
    return make_config(
        stage,
        micro=MICRO,
        zero=zero,
        bf16={"enabled": precision == "bf16"},
        activation_checkpointing={"recompute": recompute},
    )


def counted_buffer(nbytes: int, *, is_locked: bool = False, is_huge: bool = True) -> Tensor:
    """What the nvme store maps past torch's allocator, from the allocator, so that it is counted."""
    page = 4096
    made = torch.zeros(nbytes + page, dtype=torch.uint8)
    start = -made.data_ptr() % page
    return made[start : start + nbytes]


def measured(rank: int, world_size: int, config: dict[str, Any]) -> int:
    from deepspeed.tiers import nvme

    before, nvme.aligned_buffer = nvme.aligned_buffer, counted_buffer
    tokens = torch.randint(256, (MICRO, SEQ))

    def run() -> None:
        with engine_of(gpt(), config) as engine:
            # The network's speed is the machine's: have as many reductions on the wire as are predicted, no fewer, no more.
            if engine.zero_optimization_stage() == 3:
                engine._reducer._in_flight.limit = Limit(LIKELY_IN_FLIGHT_DIRECTLY, 2**62)
            for _ in range(3):
                engine.backward(engine(tokens.clone(), tokens.clone()))
                engine.step()

    try:
        with patch.object(Pending, "is_done", False):
            return measure_peak(run).allocated_nbytes
    finally:
        nvme.aligned_buffer = before
        gc.collect()


CASES = [
    (0, "fp32", "none", "device"),
    (0, "fp32", "full", "device"),
    (1, "fp32", "full", "device"),
    (1, "bf16", "none", "device"),
    (1, "bf16", "full", "device"),
    (2, "fp32", "none", "device"),
    (2, "fp32", "selective", "device"),
    (2, "fp32", "full", "cpu"),
    (2, "bf16", "none", "cpu"),
    (3, "fp32", "none", "device"),
    (3, "fp32", "full", "device"),
    (3, "bf16", "none", "device"),
    (3, "fp32", "selective", "cpu"),
    (3, "fp32", "full", "nvme"),
    (3, "bf16", "none", "nvme"),
    (3, "bf16", "full", "nvme"),
]


@pytest.mark.quick("3-fp32-full-nvme", "2-fp32-full-cpu", "3-bf16-*-device", "1-*", "0-fp32-none-device")
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_the_predicted_peak_is_within_5_percent_of_the_measured_one(
    case: tuple[int, str, str, str], tmp_path: Path
) -> None:
    config = config_of(*case, tmp_path)
    tokens = torch.zeros(MICRO, SEQ, dtype=torch.int64)
    with small_units():
        estimate = Estimator(gpt(), (tokens, tokens), device_type="cpu").estimate(config, world_size=WORLD_SIZE)
    found = max(run_ranks(WORLD_SIZE, measured, config))
    assert estimate.peak_nbytes == pytest.approx(found, rel=0.05)


def built_buckets(rank: int, world_size: int, name: str, config: dict[str, Any]) -> list[tuple[Any, ...]]:
    with engine_of(build(name), config) as engine:
        return [(b.index, b.layout.numels, b.is_sharded, b.requires_grad) for b in engine._built.buckets]


@pytest.mark.parametrize("name", ["gpt_tied", "frozen", "shared", "experts"])
@pytest.mark.parametrize("stage", [1, 3])
def test_planned_buckets_are_those_an_engine_makes(stage: int, name: str) -> None:
    config = make_config(stage, micro=1)
    assert name in MODELS
    model = build(name)
    parsed = load_config(config)
    optimizer = assemble.make_optimizer(parsed, None, assemble.parameter_groups(model, None), model)
    placing = make_placing(parsed, assemble.make_policy(parsed, model), torch.device("cpu"))
    with small_units():
        plan = plan_model(model, assemble.group_indices(optimizer), placing, assemble.make_limits(parsed), 2)
    sizes = sizes_of(plan, placing, lambda bucket, count: None)
    planned = [(b.index, b.layout.numels, b.is_sharded, b.requires_grad) for b in sizes.buckets]
    assert planned == run_ranks(2, built_buckets, name, config)[0]


def test_the_trace_has_the_allocator_s_bytes_for_forward_and_backward() -> None:
    model = gpt()
    tokens = torch.randint(256, (MICRO, SEQ))

    def run() -> None:
        loss = model(tokens.clone(), tokens.clone())
        loss.backward()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(_drop_gradient)
    for recompute in Recompute:
        blocks = checkpoint_blocks(model, recompute)
        found = measure_peak(run).allocated_nbytes
        blocks.detach()
        predicted = max(own_memory(trace_step(model, (tokens, tokens), {}, plan=recompute)))
        assert predicted == pytest.approx(found, rel=0.001)  # attention's kernel takes 18 kB of its own


def _drop_gradient(param: nn.Parameter) -> None:
    param.grad = None


def test_activations_saved_by_checkpointing_are_what_theory_says() -> None:
    model = gpt()
    tokens = torch.zeros(MICRO, SEQ, dtype=torch.int64)
    saved = []
    for recompute in (Recompute.NONE, Recompute.FULL):
        trace = trace_step(model, (tokens, tokens), {}, plan=recompute)
        at = next(i for i, event in enumerate(trace.events) if event.what is What.BACKWARD)
        saved.append(list(own_memory(trace))[at])
    stream = MICRO * SEQ * WIDTH * 4
    # 18 streams a block, of which a checkpoint keeps none but its input (see tests/activation/test_blocks.py).
    assert saved[0] - saved[1] == pytest.approx(18 * LAYERS * stream, rel=0.03)


def test_a_meta_model_of_seven_billion_parameters_is_estimated_without_memory() -> None:
    example = example_module()
    with torch.device("meta"):
        model = example.Gpt(example.GptConfig(width=4096, layers=32, heads=32, vocab=32000, seq=2048))
        tokens = torch.zeros(1, 2048, dtype=torch.int64)
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    found: list[Any] = []
    allocated = measure_peak(
        lambda: found.append(
            deepspeed.memory.estimate(model, config, (tokens, tokens), world_size=8, device_type="cuda")
        )
    ).allocated_nbytes
    assert allocated < 2**20
    estimate = found[0]
    numel = sum(param.numel() for param in model.parameters())
    assert estimate.num_params == numel > 6.5e9
    assert estimate.by_kind["optimizer states"] == pytest.approx(12 * numel / 8, rel=0.01)
    assert estimate.by_kind["parameters"] == pytest.approx(2 * numel / 8, rel=0.01)
    assert estimate.notes == ["the configuration names no optimizer; AdamW is assumed"]


def test_offload_moves_states_to_other_tiers_of_an_accelerator(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = gpt()
    numel = sum(param.numel() for param in model.parameters())
    tokens = torch.zeros(MICRO, SEQ, dtype=torch.int64)
    estimator = Estimator(model, (tokens, tokens), device_type="cuda")
    on_device, on_cpu, on_nvme = (
        estimator.estimate(config_of(3, "bf16", "none", offload, tmp_path), world_size=2)
        for offload in ("device", "cpu", "nvme")
    )
    assert on_device.on("cpu") == on_device.on("nvme") == 0
    assert on_cpu.on(Tier.CPU) >= 14 * numel / 2  # master, two moments, gradients
    assert on_nvme.on(Tier.NVME) == pytest.approx(14 * numel / 2, rel=0.01)
    assert on_nvme.on(Tier.CPU) == pytest.approx(3 * 16 * min(2**22, max_shard(estimator)), rel=0.1), "three tiles"
    assert on_cpu.peak_nbytes == on_nvme.peak_nbytes < on_device.peak_nbytes - 11 * numel / 2


def max_shard(estimator: Estimator) -> int:
    """Elements of the largest shard of the model above on two ranks: three blocks."""
    return 3 * 12 * WIDTH * WIDTH // 2


def test_a_model_that_looks_at_values_is_refused() -> None:
    class Looks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum().item() > 0 else x

    with pytest.raises(TraceError, match="Looks looks at values"):
        deepspeed.memory.estimate(Looks(4, 4), {"train_batch_size": 1}, torch.ones(1, 4))


def test_a_model_without_anything_to_train_is_refused() -> None:
    with pytest.raises(TraceError, match="nothing to differentiate"):
        deepspeed.memory.estimate(nn.Linear(4, 4).requires_grad_(False), {"train_batch_size": 1}, torch.ones(1, 4))


def test_frozen_parameters_have_no_states() -> None:
    model = WithFrozen()
    batch = model.example(4, 0, torch.Generator())
    estimate = Estimator(model, batch, device_type="cpu").estimate(make_config(0, micro=4))
    trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    assert estimate.by_kind["optimizer states"] == 8 * trained


def errors_after_the_freeze(rank: int, world_size: int, config: dict[str, Any]) -> int:
    """Bytes of state of any kind that this rank has after five steps, of which the last is local with 0/1 Adam."""
    model = build("mlp")
    with engine_of(model, config) as engine:
        for _ in range(5):
            x, y = model.example(6, 0, torch.Generator())
            engine.backward(total_loss(engine(x, y)))
            engine.step()
        return sum(
            v.nbytes for state in engine.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)
        )


@pytest.mark.parametrize(
    ("kind", "params"),
    [("OneBitAdam", {"freeze_step": 2}), ("ZeroOneAdam", {"var_freeze_step": 2, "local_step_scaler": 1})],
)
def test_errors_of_one_bit_optimizers_are_counted(kind: str, params: dict[str, Any]) -> None:
    config = {**make_config(0, micro=6), "optimizer": {"type": kind, "params": {"lr": 1e-3, **params}}}
    batch = build("mlp").example(6, 0, torch.Generator())
    estimate = Estimator(build("mlp"), batch, device_type="cpu").estimate(config, world_size=2)
    found = max(run_ranks(2, errors_after_the_freeze, config))
    assert estimate.by_kind["optimizer states"] == pytest.approx(
        found, rel=0.15
    )  # errors are padded to whole bytes of signs


def test_the_model_is_left_as_it_was() -> None:
    model = gpt()
    before = [param.data_ptr() for param in model.parameters()]
    tokens = torch.zeros(2, SEQ, dtype=torch.int64)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    deepspeed.memory.estimate(model, config_of(3, "bf16", "full", "device", ""), (tokens, tokens), world_size=4)
    assert [param.data_ptr() for param in model.parameters()] == before
    assert all(param.dtype == torch.float32 and not param._post_accumulate_grad_hooks for param in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_ledger_keeps_the_highest_total_and_its_shares() -> None:
    ledger = Ledger()
    ledger.add("a", 100)
    ledger.phase = "forward"
    ledger.add("b", 50)
    ledger.drop("a", 100)
    ledger.add("b", 60, Tier.CPU)
    peak = ledger.peaks[Tier.DEVICE]
    assert (peak.nbytes, peak.by_kind, peak.phase) == (150, {"a": 100, "b": 50}, "forward")
    assert peak.rounding_nbytes == 2 * 512 - 150
    assert ledger.peaks[Tier.CPU].nbytes == 60
    assert [granted(n) for n in (1, 512, 513, 2**20, 2**21 + 1)] == [512, 512, 1024, 2**21, 2**22]


def test_weights_that_will_be_quantized_are_named_with_their_bytes() -> None:
    model = nn.Sequential(nn.Linear(256, 512, bias=False), nn.Linear(512, 1024, bias=False))
    section = {"post_init_quant": {"1": {"num_bits": 4, "group_size": 64, "group_dim": 1, "symmetric": False}}}
    config = {"train_micro_batch_size_per_gpu": 1, "weight_quantization": section, "optimizer": {"type": "Adam"}}
    found = deepspeed.memory.estimate(model, config, (torch.ones(1, 256),), device_type="cpu", loss_of=torch.sum)
    assert found.notes == [
        "weight_quantization: 1 weights are predicted whole, 2.0 MiB a copy; quantized they take 0.3 MiB"
    ]
