"""1-bit optimizers beside tensor parallelism and pipelines: each shard as if its data-parallel ranks were all there is.

The gradients that each rank's parameters received are recorded, and played to the simulation in one process; in bf16 and fp16
too, where the simulation holds the masters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import deepspeed
from deepspeed.parallel.pipeline.module import PipelineModule
from tests.engine.runs import EPS, LR, long_but
from tests.harness import run_ranks
from tests.optim.onebit_oracle import Replayed, Simulated, onebit_adam, onebit_lamb, zero_one_adam
from tests.parallel.pipeline.models import WIDTH, batches, mlp

STEPS, FREEZE = 6, 2
LOCAL = {"var_freeze_step": 3, "var_update_scaler": 1, "local_step_scaler": 1, "local_step_clipper": 2}
"""v is updated in steps 1, 2; then averages come in 4 and 6."""
SETTINGS = {"OneBitAdam": {"freeze_step": FREEZE}, "OneBitLamb": {"freeze_step": FREEZE}, "ZeroOneAdam": LOCAL}


def config_of(kind: str, stage: int, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": kind, "params": {"lr": LR, "eps": EPS, "weight_decay": 0.01, **SETTINGS[kind]}},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 10**6},
        **more,
    }


PRECISION: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 6}},
}
DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALE = {"fp32": 1.0, "bf16": 1.0, "fp16": 64.0}


def masters(engine: Any) -> dict[str, Tensor]:
    named = engine.module.named_parameters()
    return {name: deepspeed.utils.safe_get_full_fp32_param(param).clone() for name, param in named}


def recorded(engine: Any, step: Callable[[int], None]) -> dict[str, Any]:
    """Weights before and after, each step's gradients, and which shard of which data-parallel rank this is."""
    sums: dict[str, Tensor] = {}

    def keep(name: str, param: Tensor) -> None:
        assert param.grad is not None
        sums[name] = sums[name] + param.grad if name in sums else param.grad.clone()

    for name, param in engine.module.named_parameters():
        param.register_post_accumulate_grad_hook(lambda p, name=name: keep(name, p))
    found: dict[str, Any] = {"before": masters(engine), "gradients": []}
    for i in range(STEPS):
        step(i)
        found["gradients"].append(dict(sums))
        sums.clear()
    return {**found, "after": masters(engine), "shard": engine.mesh.rank("model"), "rank": engine.mesh.rank("batch")}


def through_a_pipeline(rank: int, world_size: int, kind: str, stage: int, precision: str) -> dict[str, Any]:
    module = PipelineModule(mlp(), num_stages=2, loss_fn=torch.nn.functional.mse_loss, partition_method="uniform")
    accumulation = 2 if precision == "fp32" else 1  # sums of narrow gradients would be rounded where they are recorded
    config = config_of(kind, stage, gradient_accumulation_steps=accumulation, **PRECISION[precision])
    engine, *_ = deepspeed.initialize(model=module, config=config)
    data = batches(accumulation * STEPS, engine.mesh.rank("batch"), engine.mesh.size("batch"))
    data = iter([(x.to(DTYPE[precision]), y.to(DTYPE[precision])) for x, y in data])
    found = recorded(engine, lambda i: engine.train_batch(data))
    engine.destroy()
    return found


class Attending(torch.nn.Module):
    """Two layers that a plan of tensor parallelism cuts by columns and by rows, and one that all have."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.up_proj, self.down_proj = torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.Linear(4 * WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.nn.functional.gelu(self.up_proj(self.norm(x))))


PLAN = {"layer_specs": [
    {"patterns": [".*up_proj\\.weight$"], "partition_type": "column"},
    {"patterns": [".*down_proj\\.weight$"], "partition_type": "row"},
]}  # fmt: skip


def through_tensor_parallelism(rank: int, world_size: int, kind: str, stage: int, precision: str) -> dict[str, Any]:
    torch.manual_seed(1)
    tensor, dtype = {"autotp_size": 2, "partition_config": PLAN}, DTYPE[precision]
    config = config_of(kind, stage, tensor_parallel=tensor, **PRECISION[precision])
    engine, *_ = deepspeed.initialize(model=Attending(), config=config)
    data = list(batches(STEPS, engine.mesh.rank("batch"), engine.mesh.size("batch")))

    def step(i: int) -> None:
        x, y = (value.to(dtype) for value in data[i])
        engine.backward(torch.nn.functional.mse_loss(engine(x), y))
        engine.step()

    found = recorded(engine, step)
    assert engine.module.up_proj.weight.shape[0] == 2 * WIDTH, "it was cut"
    engine.destroy()
    return found


def simulated(kind: str, shard: list[dict[str, Any]], precision: str) -> Simulated:
    """The weights of one shard, of the gradients of its data-parallel ranks in order."""
    first = shard[0]["before"]
    # The one buffer that 1-bit LAMB compresses has a bucket's order, backwards.
    run = Replayed(dict(reversed(first.items())), len(shard), DTYPE[precision], SCALE[precision])
    steps = [[theirs["gradients"][i] for theirs in shard] for i in range(STEPS)]
    common: dict[str, Any] = {"lr": LR, "eps": EPS, "weight_decay": 0.01}
    if kind == "OneBitAdam":
        return onebit_adam(run, steps, len(shard), freeze_step=FREEZE, **common)
    if kind == "OneBitLamb":
        return onebit_lamb(run, steps, len(shard), freeze_step=FREEZE, **common)
    return zero_one_adam(run, steps, len(shard), full_steps=(1, 2), freeze_step=3, average_steps=(4, 6), **common)


KINDS = [(kind, stage) for kind in SETTINGS for stage in (0, 1)]
SHORT = [("OneBitAdam", 0, "fp32"), ("ZeroOneAdam", 1, "bf16")]


@pytest.mark.parametrize("way", [through_a_pipeline, through_tensor_parallelism])
@pytest.mark.parametrize(
    ("kind", "stage", "precision"), long_but(SHORT, [(*case, precision) for precision in DTYPE for case in KINDS])
)
def test_each_shard_has_the_bits_of_its_ranks_simulated_in_one_process(
    way: Any, kind: str, stage: int, precision: str
) -> None:
    found = run_ranks(4, way, kind, stage, precision)
    for number in (0, 1):
        shard = sorted((mine for mine in found if mine["shard"] == number), key=lambda mine: int(mine["rank"]))
        assert [mine["rank"] for mine in shard] == [0, 1]
        assert not torch.equal(*(next(iter(mine["gradients"][0].values())) for mine in shard)), "they see other data"
        expected = {name.replace("/", "."): param for name, param in simulated(kind, shard, precision).params.items()}
        for mine in shard:
            for name, weight in mine["after"].items():
                assert torch.equal(weight.view(-1), expected[name].detach().view(-1)), name
