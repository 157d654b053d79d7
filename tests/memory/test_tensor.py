"""Predictions for ranks that share layers, against the allocator of real engines."""

from __future__ import annotations

import gc
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.comm.exchange import Pending
from deepspeed.config import load_config
from deepspeed.engine import tensor as engine_tensor
from deepspeed.memory.estimator import Estimator
from deepspeed.memory.layers import AbsentRanks
from deepspeed.memory.measure import measure_peak
from deepspeed.memory.trace import What
from deepspeed.utils.errors import DeepSpeedError
from tests.harness import run_ranks

pytest.importorskip("transformers")

from tests.parallel.tensor.models import LONG

LENGTH, WORLD = 128, 2
CASES: tuple[tuple[int, dict[str, Any]], ...] = (
    (2, {"sequence_parallel_regions": True}),
    (0, {}),
    (1, {"vocab_parallel_lm_head": True}),
    (3, {"tp_overlap_comm": True}),
)


def model(device: str = "cpu") -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {
        "vocab_size": 1000,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": LENGTH,
    }
    with torch.device(device):
        made: nn.Module = LlamaForCausalLM(LlamaConfig(**sizes, use_cache=False, attn_implementation="sdpa"))  # type: ignore[arg-type]
    return made.train()


def config(stage: int, section: dict[str, Any], ranks: int = WORLD) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 200_000},
        "tensor_parallel": {"autotp_size": ranks, **section},
    }


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, (1, LENGTH), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "labels": ids.clone()}


def measured(rank: int, world: int, stage: int, section: dict[str, Any]) -> int:
    """The peak of a rank whose sums over layers are over at once: gloo's threads let go of messages when nobody looks (see
    `memory.measure`), and every layer sends some."""

    def run() -> None:
        engine, *_ = deepspeed.initialize(model=model(), config=config(stage, section))
        for _ in range(2):
            engine.backward(engine(**batch()).loss)
            engine.step()
        engine.destroy()

    def alone(group: Any, rank: int, size: int) -> AbsentRanks:
        return AbsentRanks(size, rank)

    with patch.object(Pending, "is_done", False), patch.object(engine_tensor, "TensorGroup", alone):
        found = measure_peak(run).allocated_nbytes
    gc.collect()
    return found


@pytest.mark.parametrize(("stage", "section"), [CASES[0], *(pytest.param(*case, marks=LONG) for case in CASES[1:])])
def test_the_predicted_peak_is_within_5_percent_of_a_ranks_that_has_parts_of_layers(
    stage: int, section: dict[str, Any]
) -> None:
    found = max(run_ranks(WORLD, measured, stage, section))
    estimator = Estimator(model("meta"), batch(), device_type="cpu")
    estimate = estimator.estimate(config(stage, section), world_size=WORLD)
    assert estimate.peak_nbytes == pytest.approx(found, rel=0.05)


def test_logits_that_stay_cut_are_never_whole() -> None:
    for section in ({}, {"vocab_parallel_lm_head": True}):
        trace = Estimator(model("meta"), batch(), device_type="cpu").trace(load_config(config(1, section)))
        largest = max(event.nbytes for event in trace.events if event.what is What.ALLOCATE)
        logits = LENGTH * 1000 * 4
        assert (largest < logits) is bool(section)


def test_ranks_that_do_not_make_up_groups_are_refused() -> None:
    with pytest.raises(DeepSpeedError, match="autotp_size = 2 does not divide world_size = 3"):
        Estimator(model("meta"), batch()).estimate(config(1, {}), world_size=3)
