"""Training runs of the test models through `deepspeed.initialize`, as functions that worker processes call."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import deepspeed
import deepspeed.zero.plan as zero_plan
from tests.models import Batch, build, make_batches, rank_share, to_dtype, total_loss

LONG = pytest.mark.skipif(os.environ.get("DS_TEST_LONG") != "1", reason="the whole matrix: make test-wire")
"""Of cases that go the same way as one that is always run."""


def long_but(short: Sequence[tuple[Any, ...]], every: Iterable[tuple[Any, ...]]) -> list[Any]:
    """All cases, of which only the short ones are always run."""
    return [case if case in short else pytest.param(*case, marks=LONG) for case in every]


LR = 3e-3
EPS = 1e-5
"""Adam's eps. The gradient of an attention's key bias is zero but for rounding (softmax does not see it); with 1e-8 Adam
would blow that noise up to full steps, and no two orders of summation would agree on those weights."""


@dataclass
class Run:
    """What one rank saw: per step the mean loss over ranks, the norm, the scale; at the end the whole weights."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    skipped: int = 0
    memory: dict[str, int] = field(default_factory=dict)
    agreements: int = 0


def make_config(stage: int, *, micro: int, accumulation: int = 1, clip: float = 0.0, **extra: Any) -> dict[str, Any]:
    """A configuration of a stage whose buckets are small enough to have several in the test models."""
    zero = {
        "stage": stage,
        "reduce_bucket_size": 600,
        "stage3_param_persistence_threshold": 20,
        **extra.pop("zero", {}),
    }
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": 0.01, "eps": EPS}},
        "zero_optimization": zero,
        **extra,
    }


@contextlib.contextmanager
def small_units() -> Iterator[None]:
    """At stage 3, have the small modules of the test models be units of their own."""
    before = zero_plan.MIN_UNIT_NUMEL
    zero_plan.MIN_UNIT_NUMEL = 1
    try:
        yield
    finally:
        zero_plan.MIN_UNIT_NUMEL = before


@contextlib.contextmanager
def engine_of(model: Any, config: dict[str, Any], **kwargs: Any) -> Iterator[Any]:
    """An engine that is destroyed at the end."""
    with small_units():
        engine, *_ = deepspeed.initialize(model=model, config=config, **kwargs)
    try:
        yield engine
    finally:
        engine.destroy()


def mean_over_ranks(loss: Tensor) -> float:
    """The mean over ranks of a scalar."""
    value = loss.detach().double()
    if dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value.item() / dist.get_world_size()


def whole_weights(engine: Any) -> dict[str, Tensor]:
    """Every parameter and buffer, whole; trained ones from their fp32 masters."""
    module = engine.module
    masters = {
        n: deepspeed.utils.safe_get_full_fp32_param(p) for n, p in module.named_parameters(remove_duplicate=False)
    }
    state = engine._zero3_consolidated_16bit_state_dict()
    state = state if state is not None else {}
    whole = {name: value if masters.get(name) is None else masters[name].clone() for name, value in state.items()}
    return {name: value.cpu() for name, value in whole.items()}


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch where the engine computes, as a script's loader brings it."""
    x, y = (tensor.to(device) for tensor in batch)
    return x, y


def default_backward(engine: Any, output: Any) -> None:
    """`engine.backward` of the total loss."""
    engine.backward(total_loss(output))


def train(
    rank: int,
    world_size: int,
    name: str,
    config: dict[str, Any],
    *,
    num_steps: int = 4,
    samples: int = 6,
    backward: Callable[[Any, Any], None] = default_backward,
    make_kwargs: Callable[[Any], dict[str, Any]] | None = None,
    prepare: Callable[[Any], None] | None = None,
) -> Run:
    """Train the test model `name` on this rank's share; `samples` per micro-batch over all ranks."""
    model = build(name)
    batches = make_batches(
        model, num_steps=num_steps, accumulation=config["gradient_accumulation_steps"], samples=samples
    )
    run = Run()
    with engine_of(model, config, **(make_kwargs(model) if make_kwargs else {})) as engine:
        if prepare:
            prepare(engine)
        dtype = engine.get_data_types()[0]
        for micro_batches in batches:
            losses = []
            for batch in micro_batches:
                output = engine(*on_device(to_dtype(rank_share(batch, rank, world_size), dtype), engine.device))
                backward(engine, output)
                engine.step()
                losses.append(mean_over_ranks(total_loss(output)))
            run.losses.append(sum(losses) / len(losses))
            run.grad_norms.append(engine.get_global_grad_norm())
        run.weights = whole_weights(engine)
        run.skipped = engine.skipped_steps
        run.memory = engine.memory_by_kind()
        run.agreements = engine._gatherer.num_agreements if engine._gatherer else 0
    return run
