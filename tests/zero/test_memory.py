"""Bytes at rest on each rank equal the design's table; found twice: as the engine counts, and among live storages."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import pytest
import torch

from deepspeed.zero.layout import ALIGNMENT
from deepspeed.zero.policy import policy_of_stage
from tests.engine.runs import engine_of, make_config
from tests.harness import run_ranks
from tests.models import TinyGpt, make_batches, rank_share
from tests.zero.sharded import held_storages, storages

BUCKET_NUMEL = 20_000
WIDTH = 96


def measured(rank: int, world_size: int, stage: int, is_bf16: bool) -> tuple[int, dict[str, int], dict[str, int]]:
    """Elements; bytes by kind as the engine counts them; and as storages that appeared since before the model."""
    before = held_storages()
    model = TinyGpt(width=WIDTH, depth=2)
    numel = sum(param.numel() for param in model.parameters())
    zero = {"reduce_bucket_size": BUCKET_NUMEL, "stage3_param_persistence_threshold": 0}
    config = make_config(stage, micro=1, zero=zero, bf16={"enabled": is_bf16})
    ((batch,),) = make_batches(model, num_steps=1, accumulation=1, samples=world_size)
    with engine_of(model, config) as engine:
        for _ in range(2):
            engine.backward(engine(*rank_share(batch, rank, world_size)))
            engine.step()
        # What waits for the next transfer, about as large as what is on the wire at once.
        engine._reducer.pool.clear()
        of_buckets = [bucket.exchange for bucket in engine._built.buckets]
        for exchange in [*of_buckets, *(gradients.reduction.exchange for gradients in engine._reducer.gradients)]:
            gloo = getattr(exchange, "_direct", exchange)  # beneath shared memory
            for name in ("scratch", "_retired"):
                getattr(gloo, name).clear()
        counted = engine.memory_by_kind()
        return numel, counted, _found(engine, before)


def _found(engine: Any, before: Container[int]) -> dict[str, int]:
    """Storages by the object that holds them; what no kind explains is `other`."""
    alive = {pointer: nbytes for pointer, nbytes in storages().items() if pointer not in before}
    params = {bucket.shard.untyped_storage().data_ptr() for bucket in engine._built.buckets}
    params |= {param.data.untyped_storage().data_ptr() for param in engine.module.parameters() if param.numel()}
    grads = {gradients.result.untyped_storage().data_ptr() for gradients in engine._reducer.gradients}
    states = [v for state in engine.optimizer.state.values() for v in state.values() if torch.is_tensor(v) and v.dim()]
    optimizer = {
        tensor.untyped_storage().data_ptr() for tensor in [*states, *(m.tensor for m in engine._built.masters)]
    }
    kinds = {"parameters": params, "gradients": grads - params, "optimizer": optimizer - params - grads}
    found = {kind: sum(alive.pop(pointer, 0) for pointer in sorted(pointers)) for kind, pointers in kinds.items()}
    return {**found, "other": sum(alive.values())}


@pytest.mark.parametrize("is_bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bytes_at_rest_equal_the_table(stage: int, is_bf16: bool) -> None:
    world_size = 2
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    policy = policy_of_stage(stage, param_dtype=dtype)
    for numel, counted, found in run_ranks(world_size, measured, stage, is_bf16):
        expected = {
            "parameters": policy.parameters.bytes_per_rank(numel, world_size),
            "gradients": policy.gradients.bytes_per_rank(numel, world_size),
            "optimizer": policy.optimizer.bytes_per_rank(numel, world_size) * (3 if policy.has_separate_master else 2),
        }
        padding = 4 * 3 * ALIGNMENT * world_size
        for kind, nbytes in expected.items():
            assert counted[kind] == pytest.approx(nbytes, rel=0.02, abs=padding), kind
            assert found[kind] == pytest.approx(nbytes, rel=0.02, abs=padding), kind
        assert found["other"] < 0.05 * numel * dtype.itemsize, "nothing else of the size of the model is alive"
