"""Sharded models for the tests of `deepspeed.zero`: an engine at a stage, on what may or may not be one rank of several."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import deepspeed
from tests.engine.runs import engine_of, make_config
from tests.models import build, make_batches, rank_share

ROWS = 4
"""Samples of all ranks together in a micro-batch."""


@contextlib.contextmanager
def sharded_engine(rank: int, world_size: int, stage: int = 3, name: str = "mlp", **extra: Any) -> Iterator[Any]:
    """An engine on a test model, without persistent parameters."""
    zero = {"stage3_param_persistence_threshold": 0, **extra.pop("zero", {})}
    with engine_of(build(name), make_config(stage, micro=ROWS // world_size, zero=zero, **extra)) as engine:
        yield engine


def step(engine: Any, rank: int, world_size: int, seed: int = 1) -> Tensor:
    """One forward, backward and step on this rank's share; the loss."""
    loss = backward(engine, rank, world_size, seed)
    engine.step()
    return loss


def backward(engine: Any, rank: int, world_size: int, seed: int = 1) -> Tensor:
    """One forward and backward on this rank's share; the loss."""
    ((batch,),) = make_batches(engine.module, num_steps=1, accumulation=1, samples=ROWS, seed=seed)
    dtype = engine.get_data_types()[0]
    x, y = (t.to(dtype) if t.is_floating_point() else t for t in rank_share(batch, rank, world_size))
    loss = engine(x, y)
    engine.backward(loss)
    return loss.detach()


def whole_values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every parameter, one gathered at a time."""
    values = {}
    for name, param in model.named_parameters():
        with deepspeed.zero.GatheredParameters(param):
            values[name] = param.detach().clone()
    return values


def storages() -> dict[int, int]:
    """Every storage that a live tensor of this process holds: address -> bytes."""
    return {pointer: storage.nbytes() for pointer, storage in held_storages().items()}


def held_storages() -> dict[int, torch.UntypedStorage]:
    """The same with the storages themselves: as long as they are held, no other gets one of their addresses."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor) and type(thing).__name__ not in ("FakeTensor", "ShardedPlaceholder"):
            with torch._C.DisableTorchFunctionSubclass():
                if thing.layout is not torch.strided:
                    continue  # a sparse tensor has no storage of its own
                storage = thing.untyped_storage()
                found[storage.data_ptr()] = storage
    found.pop(0, None)
    return found
