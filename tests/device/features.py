"""Runs of what splits a model, or its bytes on the wire, for a device that is not the CPU; see `test_features.py`.

Every one trains a few steps from the same seed on the device of its engine, and gives losses and weights on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import deepspeed
from tests import models
from tests.device import cases, sequences
from tests.device.cases import Found, config_of, masters, moved, settings
from tests.engine.runs import engine_of, on_device, train
from tests.parallel.expert.models import batches as expert_batches
from tests.parallel.expert.models import set_values
from tests.parallel.expert.runs import ours, whole_names
from tests.parallel.pipeline import models as layers
from tests.parallel.tensor.models import batch, small


# The CPU has a fused attention of its own, whose last bits are others than the device's.
@sdpa_kernel(SDPBackend.MATH)
def tensor(rank: int, world_size: int, stage: int) -> Found:
    """A Llama of which two ranks have half each."""
    losses = []
    with engine_of(small("llama"), settings(stage, tensor_parallel={"autotp_size": 2}, clip=0.5)) as engine:
        for step in range(cases.STEPS):
            loss = engine(**moved(batch(2, seed=step), engine.device)).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return losses, masters(engine)


def pipeline(rank: int, world_size: int, stage: int, schedule: str = "1f1b", clip: float = 0.5, **more: Any) -> Found:
    """Nine layers on two stages."""
    module = deepspeed.pipe.PipelineModule(layers.mlp(), num_stages=2, loss_fn=nn.MSELoss(), partition_method="uniform")
    section = {"schedule": schedule, **more}
    engine = layers.start(module, layers.config_of(stage, gradient_clipping=clip, pipeline=section))
    found = layers.train(engine)
    engine.destroy()
    return found["losses"], {name: weight.cpu() for name, weight in found["weights"].items()}


def zero_bubble(rank: int, world_size: int, stage: int) -> Found:
    """The same with weight gradients on their own."""
    return pipeline(rank, world_size, stage, "zb-h1")


def taken_back(rank: int, world_size: int, stage: int) -> Found:
    """The same with steps that do not wait for their norm, and that clipping takes back."""
    return pipeline(rank, world_size, stage, "zb-h2", clip=0.05, post_validation=True)


def experts(rank: int, world_size: int, stage: int) -> Found:
    """Layers whose experts two ranks share."""
    model = ours(2, 2, False)
    set_values(model, whole_names(model, 2, rank))
    losses = []
    with engine_of(model, settings(stage, clip=0.5)) as engine:
        for step in expert_batches(cases.STEPS, world_size):
            loss = engine(*(part.to(engine.device) for part in step[rank]))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return losses, masters(engine)


def _compressed(rank: int, world_size: int, stage: int, **more: Any) -> Found:
    run = train(rank, world_size, "gpt_tied", settings(stage, **more), samples=3 * world_size)
    return run.losses, run.weights


def one_bit(rank: int, world_size: int, stage: int) -> Found:
    """1-bit Adam that freezes after two steps."""
    kind = {"type": "OneBitAdam", "params": {"lr": 1e-3, "freeze_step": 2}}
    return _compressed(rank, world_size, stage, optimizer=kind)


def quantized(rank: int, world_size: int, stage: int) -> Found:
    """Weights in int8 and gradients in int4 on the wire."""
    return _compressed(rank, world_size, stage, zero={"zero_quantized_weights": True, "zero_quantized_gradients": True})


def one_bit_lamb(rank: int, world_size: int, stage: int) -> Found:
    """1-bit LAMB that freezes after two steps."""
    kind = {"type": "OneBitLamb", "params": {"lr": 1e-3, "freeze_step": 2}}
    return _compressed(rank, world_size, stage, optimizer=kind)


def zero_one(rank: int, world_size: int, stage: int) -> Found:
    """0/1 Adam: a step of full averages, one of signs, one on its own."""
    local = {"var_freeze_step": 1, "var_update_scaler": 1, "local_step_scaler": 1, "local_step_clipper": 2}
    return _compressed(rank, world_size, stage, optimizer={"type": "ZeroOneAdam", "params": {"lr": 1e-3, **local}})


def with_feedback(rank: int, world_size: int, stage: int) -> Found:
    """Gradients in int4 whose errors are kept for the next step (LoCo)."""
    loco = {"zero_quantized_gradients": True, "zeropp_loco_param": {"err_beta": 0.8, "reset_T": 16}}
    return _compressed(rank, world_size, stage, zero=loco)


def secondary(rank: int, world_size: int, stage: int) -> Found:
    """hpZ: two pairs of ranks, each with a copy of all weights; in int8 on the wire."""
    zero = {"zero_hpz_partition_size": 2, "stage3_max_reuse_distance": 0, "zero_quantized_weights": True}
    return _compressed(rank, world_size, stage, zero=zero)


def replicas(rank: int, world_size: int, stage: int) -> Found:
    """MiCS: two pairs of ranks, each with all shards."""
    return _compressed(rank, world_size, stage, zero={"mics_shard_size": 2}, clip=0.5)


def put_away(rank: int, world_size: int, stage: int) -> Found:
    """Masters and states, and at stage 3 parameters, that are on the cpu between steps."""
    losses = []
    with engine_of(models.build("gpt_tied"), settings(stage, clip=0.5)) as engine:
        steps = models.make_batches(engine.module, num_steps=cases.STEPS, accumulation=1, samples=3 * world_size)
        for (whole,) in steps:
            share = on_device(models.rank_share(whole, rank, world_size), engine.device)
            loss = models.total_loss(engine(*share))
            engine.backward(loss)
            engine.step()
            engine.offload_states(non_blocking=True)
            losses.append(loss.item())
        engine.reload_states()
        return losses, masters(engine)


def shared_step(rank: int, world_size: int, stage: int) -> Found:
    """An offloaded step of which the device has half."""
    offload = {"offload_optimizer": {"device": "cpu", "ratio": 0.5}, "sub_group_size": 1 << 11}
    adamw = config_of(stage)["optimizer"]
    return _compressed(rank, world_size, stage, zero=offload, optimizer=adamw, clip=0.5)


class Words(nn.Module):
    """A table whose gradient has the rows that were read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(30, 8, sparse=True, padding_idx=7)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.head(self.table(x).mean(1)), y)


def sparse(rank: int, world_size: int, stage: int) -> Found:
    """Gradients of a table that travel as rows at stage 0; ranks have other numbers of rows."""
    losses = []
    with engine_of(Words(), settings(stage, clip=0.5, sparse_gradients=True)) as engine:
        for step in range(cases.STEPS):
            make = torch.Generator().manual_seed(10 * step + rank)
            x, y = torch.randint(0, 30, (3, 5 + rank), generator=make), torch.randn(3, 4, generator=make)
            loss = engine(x.to(engine.device), y.to(engine.device))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return losses, masters(engine)


def autocast(rank: int, world_size: int, stage: int) -> Found:
    """Products in bf16 under torch's autocast, of fp32 weights."""
    return _compressed(rank, world_size, stage, torch_autocast={"enabled": True, "dtype": "bfloat16"})


def frozen_in_codes(rank: int, world_size: int, stage: int) -> Found:
    """Parameters that do not train rest in int8."""
    zero = {"zero_quantized_nontrainable_weights": True, "stage3_param_persistence_threshold": 0}
    run = train(rank, world_size, "frozen", settings(stage, zero=zero), samples=3 * world_size)
    return run.losses, run.weights


NUM_RANKS = {"secondary": 4, "replicas": 4}
"""Of those that need more than two."""

FEATURES: dict[str, tuple[Callable[[int, int, int], Found], tuple[int, ...]]] = {
    "tensor": (tensor, (0, 1, 2, 3)),
    "sequence": (sequences.sequence, (0, 1, 2, 3)),
    "ring": (sequences.ring, (0, 1, 2, 3)),
    "tiles": (sequences.tiles, (0, 1, 2, 3)),
    "chunks": (sequences.chunks, (0, 1, 2, 3)),
    "hidden_away": (sequences.hidden_away, (0, 1, 2, 3)),
    "pipeline": (pipeline, (0, 1, 2, 3)),
    "zero_bubble": (zero_bubble, (1, 3)),
    "taken_back": (taken_back, (0, 2)),
    "experts": (experts, (0, 1, 2, 3)),
    "one_bit": (one_bit, (0, 1)),
    "one_bit_lamb": (one_bit_lamb, (0, 1)),
    "zero_one": (zero_one, (0, 1)),
    "quantized": (quantized, (3,)),
    "with_feedback": (with_feedback, (2, 3)),
    "secondary": (secondary, (3,)),
    "replicas": (replicas, (1, 2, 3)),
    "put_away": (put_away, (1, 2, 3)),
    "shared_step": (shared_step, (3,)),
    "sparse": (sparse, (0, 1)),
    "autocast": (autocast, (0, 1, 2, 3)),
    "frozen_in_codes": (frozen_in_codes, (3,)),
}
"""Name: the run, and the stages it goes with. `make test-device` runs all of them."""
