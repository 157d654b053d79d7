"""Flex attention over parts of sequences: its forward equals one process; its backward is refused where torch has none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import deepspeed
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from tests.harness import run_ranks
from tests.parallel.sequence import runs
from tests.parallel.sequence.test_training import WHEN_LONG

LENGTH = 25
"""At 24 torch 2.13's kernel for a CPU, compiled from plain flex attention, gives other numbers than flex attention itself, or NaN."""
KINDS = (("packed", 1), ("padded", 3), ("left", 3), ("plain", 1), ("holes", 3))
"""(batch, samples)"""
NO_BACKWARD = "FlexAttention does not support backward on CPU"
"""What torch 2.13 says."""


def forwards(rank: int, world: int, stage: int, more: dict[str, Any]) -> tuple[list[Tensor], str]:
    """The logits of this rank's part of each batch without gradients, and what a forward with gradients says."""
    model = runs.tiny_model(heads=8, kv=4, attention="flex_attention", **more)
    mpu = UlyssesSPAttentionHF.register_with_transformers(model, "flex_attention", world, micro_batch_size=1)
    try:
        engine, *_ = deepspeed.initialize(model=model, mpu=mpu, config=runs.config_of(stage))
        parts = [runs.cut(runs.batch_of(kind, LENGTH, samples), rank, world) for kind, samples in KINDS]
        for part in parts:
            del part["shift_labels"]
        # For lengths that vary, torch 2.13 generates C++ for its kernel on a CPU that does not compile.
        with torch.no_grad(), torch._dynamo.config.patch(automatic_dynamic_shapes=False):
            found = [engine(**part).logits for part in parts]
        with pytest.raises(NotImplementedError) as refused:
            engine(**parts[0])
        engine.destroy()
    finally:
        UlyssesSPAttentionHF.unregister()
        parallel_state_sp.destroy_sequence_parallel()
    return found, str(refused.value)


@WHEN_LONG
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("more", [{}, {"model_type": "mistral", "sliding_window": 5}], ids=["whole", "window"])
def test_forwards_of_flex_attention_equal_one_process_and_training_is_refused(size: int, more: dict[str, Any]) -> None:
    everyone = run_ranks(size, forwards, size % 4, more, timeout=500.0)
    model = runs.tiny_model(heads=8, kv=4, **more)
    for i, (kind, samples) in enumerate(KINDS):
        batch = runs.batch_of(kind, LENGTH, samples)
        with torch.no_grad():
            expected = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        seen = batch["labels"] != -100 if kind != "packed" else torch.ones_like(batch["labels"], dtype=torch.bool)
        logits = torch.cat([found[i] for found, _ in everyone], dim=1)
        torch.testing.assert_close(logits[seen], expected[seen], rtol=1e-5, atol=1e-6)
    assert all(NO_BACKWARD in words for _, words in everyone)
