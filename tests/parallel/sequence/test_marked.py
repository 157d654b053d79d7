"""Scripts written for the original's pass "autosp": whole sequences on every rank train as plain PyTorch trains on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import deepspeed
from deepspeed.compile.passes.sp_compile import prepare_autosp_inputs
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from deepspeed.utils.errors import DeepSpeedError
from tests.harness import run_ranks
from tests.parallel.sequence import runs


def config_of(stage: int, size: int) -> dict[str, Any]:
    """As such a script writes it."""
    return runs.config_of(stage, sequence_parallel_size=size, compile={"deepcompile": True, "passes": ["autosp"]})


def train(
    rank: int, world: int, size: int, stage: int, batches: list[runs.Batch], kind: str, by_position: bool
) -> tuple[float, dict[str, Tensor], float, int]:
    """The script: one backward. Its loss, the reduced gradients, the loss in evaluation, and the tokens of the output."""
    engine, *_ = deepspeed.initialize(model=runs.tiny_model(), config=config_of(stage, size))
    try:
        engine.compile(backend="inductor")
        batch = batches[rank // size]
        positions = batch["position_ids"] if kind != "plain" else None
        ids, labels, positions, mask = prepare_autosp_inputs(
            batch["input_ids"], batch["labels"], positions, batch.get("attention_mask"), seq_dim=1
        )
        assert ids is batch["input_ids"] and labels is batch["labels"]
        if by_position:
            output = engine(ids, mask, positions, labels=labels)
        else:
            output = engine(input_ids=ids, labels=labels, position_ids=positions, attention_mask=mask)
        engine.backward(output.loss)
        found = runs.gradients_of(engine)
        engine.step()
        tokens = output.logits.shape[1]
        engine.eval()
        with torch.no_grad():
            evaluated = engine(input_ids=ids, labels=labels, position_ids=positions, attention_mask=mask).loss
        return float(output.loss.detach()), found, float(evaluated), tokens
    finally:
        engine.destroy()
        UlyssesSPAttentionHF.unregister()


@pytest.mark.parametrize(
    ("stage", "kind", "length", "world", "by_position"),
    [
        (0, "plain", 16, 2, False),
        (1, "packed", 17, 2, False),
        (1, "padded", 16, 4, True),
        (3, "padded", 15, 2, True),
    ],
)
def test_whole_sequences_are_split_and_train_as_in_one_process(
    stage: int, kind: str, length: int, world: int, by_position: bool
) -> None:
    batches = [runs.batch_of(kind, length, samples=2, seed=3 + i) for i in range(world // 2)]
    _, gradients = runs.plain(runs.tiny_model(), batches)
    for _, own, _, tokens in run_ranks(world, train, 2, stage, batches, kind, by_position):
        assert tokens in (length // 2, -(-length // 2))
        assert runs.ratio(own, gradients) == pytest.approx(1.0, abs=1e-5)
        assert runs.largest_error(own, gradients) < 1e-5


def bad_inputs(rank: int, world: int) -> dict[str, str]:
    """What ranks are told."""
    engine, *_ = deepspeed.initialize(model=runs.tiny_model(), config=config_of(0, world))

    def said(batch: Tensor) -> str:
        with pytest.raises(DeepSpeedError) as error:
            engine(input_ids=prepare_autosp_inputs(batch, batch).input_id, labels=batch)
        return str(error.value)

    try:
        found = {"short": said(torch.ones(1, 1, dtype=torch.long))}
        found["other"] = said(torch.full((1, 8), 3 + rank))
        torch.manual_seed(0)
        engine(input_ids=prepare_autosp_inputs(ids := torch.randint(9, (1, 8))).input_id, labels=ids)  # and goes on
    finally:
        engine.destroy()
        UlyssesSPAttentionHF.unregister()
    return found


def test_sequences_that_differ_or_are_too_short_are_told_on_every_rank() -> None:
    for found in run_ranks(2, bad_inputs):
        assert "a sequence of 1 tokens cannot be shared by 2 ranks" in found["short"]
        assert "ranks [1] of a sequence have other tokens than its first rank" in found["other"]
        assert "Give the ranks of a sequence the same batch" in found["other"]


def test_dimensions_and_lengths_are_checked() -> None:
    ids = torch.ones(2, 8, dtype=torch.long)
    with pytest.raises(ValueError, match="input_id is required"):
        prepare_autosp_inputs(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"seq_dim = 2, but input_id has the shape \(2, 8\)"):
        prepare_autosp_inputs(ids, seq_dim=2)
    with pytest.raises(ValueError, match=r"seq_dim = 1, but position_id has the shape \(8,\)"):
        prepare_autosp_inputs(ids, ids, torch.arange(8))
    with pytest.raises(ValueError, match="label_id has 7 tokens along dimension 1, input_id 8"):
        prepare_autosp_inputs(ids, ids[:, 1:])


def test_a_model_that_nobody_splits_gets_what_it_was_given() -> None:
    batch = runs.batch_of("plain")
    model = runs.tiny_model()
    expected = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    ids, labels, *_ = prepare_autosp_inputs(batch["input_ids"].clone(), batch["labels"].clone())
    assert torch.equal(model(input_ids=ids, labels=labels).loss, expected)
