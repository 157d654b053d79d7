"""bf16 with activation checkpointing under an engine, backward by the engine or plain, equals bf16 without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.engine.runs import engine_of, make_config, whole_weights
from tests.harness import run_ranks
from tests.models import Checkpointed, make_batches, rank_share, to_dtype


def steps(
    rank: int, world_size: int, stage: int, use_reentrant: bool, is_plain: bool, recomputes: bool
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Checkpointed(use_reentrant=use_reentrant)
    if not recomputes:
        model.features = lambda x: _straight(model, x)  # type: ignore[method-assign]
    batches = make_batches(model, num_steps=2, accumulation=1, samples=4)
    with engine_of(model, make_config(stage, micro=2, bf16={"enabled": True})) as engine:
        for (batch,) in batches:
            loss = engine(*to_dtype(rank_share(batch, rank, world_size), torch.bfloat16))
            loss.backward() if is_plain else engine.backward(loss)
            engine.step()
        return whole_weights(engine)


def _straight(model: Checkpointed, x: Tensor) -> Tensor:
    x = model.entry(x)
    for layer in model.blocks:
        x = x + layer(x)
    return x


@pytest.mark.parametrize("is_plain", [False, True], ids=["engine.backward", "loss.backward"])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("stage", [1, 3])
def test_recomputing_changes_no_bit(stage: int, use_reentrant: bool, is_plain: bool) -> None:
    straight = run_ranks(2, steps, stage, use_reentrant, is_plain, recomputes=False)[0]
    again = run_ranks(2, steps, stage, use_reentrant, is_plain, recomputes=True)[0]
    assert all(torch.equal(again[name], value) for name, value in straight.items())
