"""Saving under tensor parallelism and resuming at another size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import deepspeed
from tests.parallel.tensor.models import batch, share, small
from tests.parallel.tensor.runs import config


def steps(engine: Any, rank: int, dp: int, seeds: range) -> list[float]:
    losses = []
    for seed in seeds:
        loss = engine(**share(batch(4, seed=seed), rank, dp)).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        losses.append(float(mean) / torch.distributed.get_world_size())
    return losses


def told(tp: int, stage: int) -> dict[str, Any]:
    asked = config(tp, stage)
    asked["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    del asked["train_micro_batch_size_per_gpu"]
    return {**asked, "train_batch_size": 4}


def model() -> torch.nn.Module:
    """With as many heads as the largest group has ranks."""
    return small("llama", num_attention_heads=8)


def save(rank: int, world_size: int, folder: str, tp: int, stage: int) -> list[float]:
    """Two steps, a checkpoint, and the losses of the next two; the exported model beside it."""
    dp = world_size // tp
    engine, *_ = deepspeed.initialize(model=model(), config=told(tp, stage))
    steps(engine, rank // tp, dp, range(2))
    engine.save_checkpoint(folder)
    engine.save_16bit_model(f"{folder}/export", "model.bin")
    state = engine._consolidated_16bit_state_dict() if stage == 3 or tp > 1 else None
    if rank == 0 and state is not None:
        whole = model().state_dict()
        assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in whole.items()}
    losses = steps(engine, rank // tp, dp, range(2, 4))
    engine.destroy()
    return losses


def resume(rank: int, world_size: int, folder: str, tp: int, stage: int) -> list[float]:
    """A checkpoint in place of what another step left; the model exported at once is the saved one, byte for byte."""
    dp = world_size // tp
    engine, *_ = deepspeed.initialize(model=model(), config=told(tp, stage))
    steps(engine, rank // tp, dp, range(7, 8))
    engine.load_checkpoint(folder)
    again = Path(folder, f"export-{tp}-of-{world_size}-at-{stage}")
    engine.save_16bit_model(str(again), "model.bin")
    if rank == 0:
        assert (again / "model.bin").read_bytes() == Path(folder, "export", "model.bin").read_bytes()
    losses = steps(engine, rank // tp, dp, range(2, 4))
    engine.destroy()
    return losses
