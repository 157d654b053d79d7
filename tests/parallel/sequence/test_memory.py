"""Memory under sequence parallelism is what theory says: each rank keeps its share of the activations, and never the logits."""

from __future__ import annotations

from typing import Any

import pytest

import deepspeed
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from deepspeed.sequence import tile_model
from tests.harness import run_ranks
from tests.parallel.counted import Largest, kept_nbytes
from tests.parallel.sequence import runs
from tests.parallel.sequence.test_training import WHEN_LONG

LENGTH, LOSS_TOKENS = 240, 16


def counted(rank: int, world: int, layers: int) -> tuple[int, list[int]]:
    """Bytes that a forward of this rank's part keeps; rows of the largest logits of a step, and with its loss in tiles."""
    model = runs.tiny_model(heads=8, kv=4, layers=layers)
    batch = runs.batch_of("plain", LENGTH)
    mpu = UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", world, micro_batch_size=1)
    engine, *_ = deepspeed.initialize(model=model, mpu=mpu, config=runs.config_of(0))
    part: dict[str, Any] = runs.cut(batch, rank, world)
    part["labels"] = part["shift_labels"]
    found = kept_nbytes(engine.module, lambda: engine.module(**part).loss)
    rows = []
    for tiles in (False, True):
        if tiles:
            tile_model(model, loss_tokens=LOSS_TOKENS)
        with Largest(runs.VOCAB) as seen:
            engine.backward(engine(**part).loss)
        engine.step()
        rows.append(seen.numel // runs.VOCAB)
    engine.destroy()
    if world > 1:
        UlyssesSPAttentionHF.unregister()
        parallel_state_sp.destroy_sequence_parallel()
    return found, rows


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=WHEN_LONG)])
def test_a_layer_keeps_its_share_and_logits_are_never_whole(size: int) -> None:
    """The share, and what attention gave before it was exchanged: its backward reads that, the next weight's the rest."""
    (alone, _), (alone_three, _) = (run_ranks(1, counted, layers)[0] for layers in (1, 3))
    hidden, part = 8 * 8, LENGTH // size
    for (one, _), (three, rows) in zip(run_ranks(size, counted, 1), run_ranks(size, counted, 3), strict=True):
        assert (three - one) / 2 == pytest.approx((alone_three - alone) / 2 / size + part * hidden * 4, rel=0.02)
        assert rows == [max(part, hidden), hidden]  # the head's weight, transposed, has as many rows as it is wide
