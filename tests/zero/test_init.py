"""`zero.Init`: models built sharded have the weights of the plainly built ones, and train like them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.zero import ZeroParamStatus
from deepspeed.zero import build as zero_build
from tests.engine.runs import EPS, LR, engine_of, make_config, whole_weights
from tests.harness import run_ranks
from tests.models import MODELS, Mlp, TinyGpt, build, make_batches, rank_share, total_loss
from tests.oracle import Trained, assert_close_weights, train_plain
from tests.zero.sharded import whole_values

STAGES = (0, 1, 2, 3)
FP32 = {"config_dict_or_path": {"train_micro_batch_size_per_gpu": 2}}


class Initialised(TinyGpt):
    """Initialises its children again, in the ways people do: `apply`, `.data`, `nn.init`, assignment, a child's values."""

    def __init__(self) -> None:
        super().__init__(tied=False)
        self.apply(self._initialise)
        self.embedding.weight.data.normal_(mean=0.0, std=0.02)
        nn.init.ones_(self.norm.bias)
        with torch.no_grad():
            self.blocks[0].qkv.bias.uniform_(-1, 1)
            self.head.weight.copy_(self.embedding.weight)
        self.blocks[1].qkv.bias.data = torch.full((96,), 0.25)
        self.register_buffer("frequencies", 1.0 / (10000 ** (torch.arange(0, 8, 2, dtype=torch.int64).float() / 8)))
        self.own = nn.Parameter(self.norm.weight.data[:3] * 2)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.03)
            nn.init.zeros_(module.bias) if module.bias is not None else None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, y) + self.own.float().square().sum()


def make(name: str) -> Any:
    return Initialised() if name == "initialised" else MODELS[name]()


def built_weights(rank: int, world_size: int, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(rank)
    plain = make(name)
    torch.manual_seed(rank)
    with deepspeed.zero.Init(**FP32):
        sharded = make(name)
    assert all(p.numel() == 0 and p.ds_status is ZeroParamStatus.NOT_AVAILABLE for p in sharded.parameters())
    for key, buffer in plain.named_buffers():
        assert torch.equal(buffer, sharded.get_buffer(key))
        assert buffer.dtype == sharded.get_buffer(key).dtype
    return {n: p.detach() for n, p in plain.named_parameters()}, whole_values(sharded)


@pytest.mark.parametrize("name", ["initialised", "gpt_tied", "shared", "outside_use", "frozen"])
def test_weights_are_those_of_the_first_ranks_plainly_built_model(name: str) -> None:
    (plain, first), (_, second) = run_ranks(2, built_weights, name)
    assert plain.keys() == first.keys()
    for key, value in plain.items():
        assert torch.equal(value, first[key]), key
        assert torch.equal(value, second[key]), key


class Deep(nn.Module):
    """Equal layers, which `apply` initialises when all of them exist."""

    def __init__(self, depth: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(depth))
        self.peak = 0
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.ones_(module.weight)
            self.note()

    def note(self) -> None:
        buckets = {slot.bucket for p in self.parameters() if (slot := p.__dict__.get("_zero_slot"))}
        self.peak = max(self.peak, sum(bucket.full.untyped_storage().nbytes() for bucket in buckets))


def peaks(rank: int, world_size: int) -> tuple[int, int, int]:
    with deepspeed.zero.Init(**FP32):
        model = Deep()
    one = 4 * (64 * 64 + 64 + 64)
    while_building = model.peak
    model.peak = 0
    real = zero_build._copy_values

    def noting(*args: Any) -> None:
        real(*args)
        model.note()

    zero_build._copy_values = noting
    try:
        with engine_of(model, make_config(3, micro=1, zero={"stage3_param_persistence_threshold": 64})):
            pass
    finally:
        zero_build._copy_values = real
    return while_building, model.peak, one


def test_no_rank_ever_holds_more_than_a_bucket_or_two_whole() -> None:
    for building, regrouping, one in run_ranks(2, peaks):
        assert 0 < building <= 2 * one
        # Persistent biases are whole: one small bucket more.
        assert 0 < regrouping <= 3 * one


def trained(rank: int, world_size: int, name: str, stage: int) -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(0)
    with deepspeed.zero.Init(**FP32):
        model = make(name)
    batches = make_batches(model, num_steps=3, accumulation=1, samples=4)
    losses = []
    with engine_of(model, make_config(stage, micro=2)) as engine:
        for (batch,) in batches:
            loss = total_loss(engine(*rank_share(batch, rank, world_size)))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        kinds = {type(p).__name__ for p in model.parameters()}
        assert kinds == ({"Parameter"} if stage < 3 else {"ShardedParameter", "ZeroParameter"}), kinds
        return losses, whole_weights(engine)


@functools.lru_cache(maxsize=None)
def oracle(name: str) -> Trained:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make(name)
    batches = make_batches(model, num_steps=3, accumulation=1, samples=4)
    return train_plain(model, batches, lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.01, eps=EPS))


@pytest.mark.parametrize("name", ["initialised", "frozen"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_model_built_sharded_trains_like_plain_pytorch_at_every_stage(stage: int, name: str) -> None:
    (first, weights), (second, _) = run_ranks(2, trained, name, stage)
    expected = oracle(name)
    assert [(a + b) / 2 for a, b in zip(first, second, strict=True)] == pytest.approx(expected.losses, rel=1e-5)
    assert_close_weights(weights, expected.weights, 1e-4)


def dtypes(rank: int, world_size: int) -> list[tuple[torch.dtype, torch.dtype]]:
    low = "fp16" if deepspeed.get_accelerator().is_fp16_supported() else "bf16"
    base = {"train_micro_batch_size_per_gpu": 1}
    auto: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
    }
    cases: list[tuple[dict[str, Any], torch.dtype]] = [
        ({}, torch.float16 if low == "fp16" else torch.bfloat16),
        ({"dtype": torch.float64}, torch.float64),
        ({"config_dict_or_path": base}, torch.float32),
        ({"config": base}, torch.float32),
        ({"config_dict_or_path": {**base, "bf16": {"enabled": True}}}, torch.bfloat16),
        ({"config_dict_or_path": {**base, "fp16": {"enabled": True}}}, torch.float16),
        ({"config_dict_or_path": {**base, "bf16": {"enabled": True}}, "dtype": torch.float32}, torch.float32),
        ({"config_dict_or_path": auto}, torch.float32),
        ({"config_dict_or_path": {"train_batch_size": 4, **base, "gradient_accumulation_steps": 2}}, torch.float32),
    ]
    found = []
    for arguments, expected in cases:
        with deepspeed.zero.Init(**arguments):
            layer = nn.Linear(2, 2)
        found.append((layer.weight.dtype, expected))
    return found


def test_the_dtype_is_the_arguments_else_the_configurations_else_low() -> None:
    assert all(got == expected for got, expected in run_ranks(2, dtypes)[0])


def forms(rank: int, world_size: int) -> None:
    ready = build("mlp")
    values = {name: param.detach().clone() for name, param in ready.named_parameters()}
    deepspeed.zero.Init(module=ready, dtype=torch.float32)
    assert all(param.numel() == 0 for param in ready.parameters())
    assert all(torch.equal(value, values[name]) for name, value in whole_values(ready).items())
    with deepspeed.zero.Init(enabled=False):
        assert nn.Linear(2, 2).weight.numel() == 4
    with deepspeed.zero.Init(dtype=torch.float32):
        empty = nn.Module()
        empty.none = nn.Parameter(torch.zeros(0, 3))
        outer = nn.Linear(2, 2)
        wrapped = nn.Sequential(outer, nn.ReLU())
        assert outer.weight.numel() == 0, "a child is cut when its parent takes it"
        with deepspeed.zero.Init(dtype=torch.float32):
            inner = nn.Linear(3, 3)
    assert inner.weight.ds_shape == (3, 3)
    assert wrapped[0].weight.ds_shape == (2, 2)
    assert empty.none.ds_shape == (0, 3)
    assert nn.Linear(2, 2).weight.numel() == 4, "nothing stays behind"
    with pytest.raises(ZeroDivisionError), deepspeed.zero.Init(dtype=torch.float32):
        raise ZeroDivisionError
    assert nn.Linear(2, 2).weight.numel() == 4
    with deepspeed.zero.Init(dtype=torch.float32):
        model = Mlp()
        engine, *_ = deepspeed.initialize(model=model, config=make_config(3, micro=1))
        assert nn.Linear(2, 2).weight.numel() == 4, "initialize ends the context"
    engine.destroy()
    with pytest.raises(ValueError, match="data_parallel_group or sequence_data_parallel_group, not both"):
        group = torch.distributed.group.WORLD
        deepspeed.zero.Init(data_parallel_group=group, sequence_data_parallel_group=group)
    with pytest.raises(ValueError, match="nvme_path"):
        deepspeed.zero.Init(remote_device="nvme")
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deepspeed.zero.init.warn_once", said.append)
        with deepspeed.zero.Init(dtype=torch.float32, zero_quantized_weights=True):
            layer = nn.Linear(2, 2)
    assert layer.weight.numel() == 0
    (line,) = said
    assert line.startswith("zero.Init(zero_quantized_weights=True) has no effect by itself")


def test_an_existing_module_nested_contexts_and_contexts_that_end_early() -> None:
    run_ranks(2, forms)


def first_states(rank: int, world_size: int) -> None:
    """Adagrad makes its states where it is constructed, from parameters that are sharded already."""
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    torch.manual_seed(0)
    plain = nn.Linear(8, 8)
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = nn.Linear(8, 8)
    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
        model.load_state_dict(plain.state_dict())
    own, other = (torch.optim.Adagrad(m.parameters(), lr=0.1, initial_accumulator_value=0.2) for m in (plain, model))
    engine, *_ = deepspeed.initialize(model=model, optimizer=other, config=config)
    for _ in range(2):
        x = torch.randn(4, 8)
        plain(x).pow(2).mean().backward()
        own.step()
        own.zero_grad()
        engine.backward(engine(x.chunk(world_size)[rank]).pow(2).mean())
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        for want, got in zip(plain.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(got.detach(), want.detach())
    engine.destroy()


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_optimizer_that_makes_its_states_when_it_is_constructed_takes_sharded_parameters(world_size: int) -> None:
    run_ranks(world_size, first_states)
